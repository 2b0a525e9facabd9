"""Rebuilds the network without lssl. `python rebuild.py` compares its answers with the stored ones."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
META = json.loads((HERE / "metadata.json").read_text()) if (HERE / "metadata.json").exists() else {}


class Finest(nn.Module):
    """The finest of several outputs, of a network with deep supervision; any other output as it is."""

    def forward(self, output: Any) -> Tensor:
        """The map of most voxels."""
        return max(output, key=lambda one: one.shape[2:].numel()) if isinstance(output, list | tuple) else output


def load(folder: Path = HERE) -> nn.Module:
    """The network with its weights; with ``META["classes"]``, it gives their logits."""
    meta = META if folder == HERE else json.loads((folder / "metadata.json").read_text())
    module, _, name = meta["network"]["class"].rpartition(".")
    network = getattr(importlib.import_module(module), name)(**_arguments(meta["network"]["arguments"]))
    _fill(network, folder / "model")
    for part in network.modules():  # how borders are padded is no weight, so no state_dict holds it
        if isinstance(part, nn.Conv3d) and (part.padding == "same" or any(n != 0 for n in part.padding)):
            part.padding_mode = meta["padding"]
    if meta["classes"]:
        head = nn.Conv3d(meta["head"][0], meta["head"][1], 1)
        _fill(head, folder / "head")
        network = nn.Sequential(network, Finest(), head)
    return network.eval()


def features(network: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Tap → its feature map, of an image ``(B, C, D, H, W)``; and the network's ``output``.

    Feature ``f`` of a tap is centred at voxel ``stride · f + offset``; see ``META["taps"]``.
    """
    found: dict[str, Tensor] = {}
    inner = network.get_submodule("0") if META["classes"] else network
    hooks = [
        inner.get_submodule(tap["path"]).register_forward_hook(
            lambda module, inputs, output, name=name: found.update({name: output})
        )
        for name, tap in META["taps"].items()
    ]
    try:
        return {"output": Finest()(network(image))} | found
    finally:
        for hook in hooks:
            hook.remove()


def _fill(module: nn.Module, path: Path) -> None:
    if (file := path.with_suffix(".safetensors")).exists():
        from safetensors.torch import load_model

        load_model(module, str(file))
    else:
        module.load_state_dict(torch.load(path.with_suffix(".pt"), weights_only=True))


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Torch's classes are given by their names."""
    return {
        key: locate(value) if isinstance(value, str) and value.startswith("torch.") else value
        for key, value in given.items()
    }


def compare() -> float:
    """Largest difference to the stored answers, as a share of the largest value of each."""
    sample = torch.load(HERE / "sample.pt", weights_only=True)
    with torch.no_grad():
        answers = features(load(), sample["image"])
    answers |= {name: answers[name][..., answers[name].shape[-1] // 2] for name in META["taps"]}  # one plane of each
    return max(
        float((answers[name] - value).abs().max() / value.abs().max()) for name, value in sample["answers"].items()
    )


if __name__ == "__main__":
    print(compare())
