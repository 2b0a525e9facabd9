"""One function per target: it writes the weights, the stored answers and the program that compares them."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lssl.export import nnunet
from lssl.networks.tapped import output_maps, tapped
from lssl.utils.errors import InputError
from lssl.utils.torch_file import write_torch

__all__ = ["TARGETS", "Network", "answers"]

HERE = Path(__file__).parent
LOADED = "`rebuild.load()` gives the network in PyTorch, `rebuild.features(network, image)` its taps"


@dataclass(frozen=True)
class Network:
    """What is exported.

    Attributes:
        module: the network.
        head: 1×1×1 convolution of a Segmenter, which makes logits of its output.
        paths: tap → submodule.
        meta: of :func:`lssl.export.describe.described`.
        crop: ``(1, C, D, H, W)``, the image to compare on.
    """

    module: nn.Module
    head: nn.Conv3d | None
    paths: Mapping[str, str]
    meta: Mapping[str, Any]
    crop: Tensor


@torch.no_grad()
def answers(network: Network) -> dict[str, Tensor]:
    """The output for the crop, and the middle plane of every tap: a whole tap of a large crop takes much space."""
    with tapped(network.module, network.paths, stop=False) as features:
        output = output_maps(network.module(network.crop))[0]  # the finest, with deep supervision
    planes = {name: value[..., value.shape[-1] // 2].clone() for name, value in features.items()}
    return {"output": output if network.head is None else network.head(output)} | planes


def to_monai(network: Network, out: Path) -> tuple[str, str]:
    """``model.pt``, and ``head.pt`` of a Segmenter.

    Returns:
        The file with the weights, and how it is used.
    """
    if not network.meta["network"]["class"].startswith("monai.networks.nets."):
        raise InputError(
            f"backbone.network: {network.meta['network']['class']} is no network of MONAI, so that MONAI could not "
            f"rebuild it; try --to safetensors."
        )
    write_torch(out / "model.pt", network.module.state_dict())
    if network.head is not None:
        write_torch(out / "head.pt", network.head.state_dict())
    _stored(network, out)
    return "model.pt", f"{LOADED}; they need torch and MONAI alone."


def to_safetensors(network: Network, out: Path) -> tuple[str, str]:
    """``model.safetensors``, and ``head.safetensors`` of a Segmenter; any network whose class is not of lssl."""
    from safetensors.torch import save_model

    save_model(network.module, str(out / "model.safetensors"), metadata={"format": "pt"})
    if network.head is not None:
        save_model(network.head, str(out / "head.safetensors"), metadata={"format": "pt"})
    _stored(network, out)
    return "model.safetensors", f"{LOADED}; they need safetensors and `{network.meta['network']['class']}`."


def to_nnunet(network: Network, out: Path) -> tuple[str, str]:
    """A folder as nnU-Net leaves one after training: plans, checkpoint, and ``dataset.json`` of a Segmenter."""
    meta = network.meta
    built = nnunet.architecture(meta["network"]["class"], meta["network"]["arguments"], network.module)
    if meta["padding"] != "zeros":
        raise InputError(
            f"backbone.padding: this network was trained with '{meta['padding']}' and nnU-Net pads with zeros, so that "
            f"it would answer differently; train with backbone.padding zeros."
        )
    if not meta["spacing_mm"]:
        raise InputError(
            "The checkpoint does not say the voxels' size, and nnU-Net needs one: give --spacing X Y Z (mm)."
        )
    plans = nnunet.plans(built, meta["in_channels"], meta["spacing_mm"], meta["view_size"])
    channels = meta["data"].get("channels") or [f"channel {number}" for number in range(meta["in_channels"])]
    classes = meta["classes"] or [f"feature {number}" for number in range(1, meta["out_channels"])]
    dataset = nnunet.dataset_json(channels, list(classes))
    checkpoint = {
        "network_weights": nnunet.weights(meta["network"]["class"], network.module, network.head),
        "init_args": {"plans": plans, "configuration": nnunet.CONFIGURATION, "fold": "all", "dataset_json": dataset},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": None,
    }
    (out / "fold_all").mkdir()
    write_torch(out / "fold_all/checkpoint_final.pth", checkpoint)
    (out / "plans.json").write_text(json.dumps(plans, indent=2) + "\n")
    (out / "dataset.json").write_text(json.dumps(dataset, indent=2) + "\n")
    _stored(network, out, "rebuild_nnunet.py", ("output",))
    return "fold_all/checkpoint_final.pth", nnunet.USE + (nnunet.PREDICT if meta["classes"] else "")


def to_onnx(network: Network, out: Path) -> tuple[str, str]:
    """``model.onnx`` with the output and every tap, for any batch and any size that the network accepts."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise InputError(f"--to onnx needs {', '.join(missing)}: pip install 'lssl[onnx]'.")
    fixed = _onnx(network, out / "model.onnx")
    _stored(network, out, "rebuild_onnx.py", file="sample.npz")
    sizes = (
        f"images of {'×'.join(map(str, network.crop.shape[2:]))} voxels alone"
        if fixed
        else "images of other sizes, too"
    )
    return (
        "model.onnx",
        f'`rebuild.load().run(None, {{"image": array}})` gives the output and the taps; it takes {sizes}.',
    )


def _onnx(network: Network, path: Path) -> bool:
    """Writes the file; True if the network could be traced at the crop's size only."""
    model = _Answering(network).eval()
    names = ["output", *network.paths]
    free = {"image": dict.fromkeys((0, 2, 3, 4), torch.export.Dim.DYNAMIC)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    for shapes in (free, None):
        options: Any = {"dynamic_shapes": shapes, "dynamo": True, "verbose": False}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = torch.onnx.export(
                    model, (network.crop,), input_names=["image"], output_names=names, **options
                )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), "no reason was given")
            continue
        assert program is not None
        program.save(str(path))
        return shapes is None
    raise InputError(f"torch cannot write {type(network.module).__name__} as ONNX: {reason}")


class _Answering(nn.Module):
    """A network that returns its output and its taps."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.inner, self.head, self.paths = network.module, network.head, dict(network.paths)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Output, then taps in their order."""
        with tapped(self.inner, self.paths, stop=False) as features:
            output = self.inner(image)
        return (output if self.head is None else self.head(output), *(features[name] for name in self.paths))


def _stored(
    network: Network, out: Path, program: str = "rebuild.py", only: tuple[str, ...] = (), file: str = "sample.pt"
) -> None:
    """The crop, the answers to it, and the program that compares them."""
    given = {name: value for name, value in answers(network).items() if not only or name in only}
    if file.endswith(".npz"):
        arrays: Any = {"image": network.crop.numpy(), **{name: value.numpy() for name, value in given.items()}}
        np.savez(out / file, **arrays)
    else:
        write_torch(out / file, {"image": network.crop, "answers": given})
    (out / "rebuild.py").write_text((HERE / program).read_text())


#: Name after ``--to`` → what writes it.
TARGETS: dict[str, Callable[[Network, Path], tuple[str, str]]] = {
    "monai": to_monai,
    "nnunet": to_nnunet,
    "safetensors": to_safetensors,
    "onnx": to_onnx,
}
