"""Weights that lssl did not write: a plain state_dict or safetensors file, renamed to fit a network.

Known dialects: MONAI's published SwinUNETR SSL weights, and nnU-Net's and nnssl's PlainConvUNet for a DynUNet.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lssl.utils.errors import InputError

__all__ = ["dialects", "is_foreign", "read_weights", "renamed"]

NESTS = ("state_dict", "model", "network_weights")  # Lightning and MONAI, many trainers, nnU-Net
DEPTH = 4  # parts of a prefix, as in module.backbone.network.encoder.


def _load(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise InputError(f"There is no checkpoint {path}.")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError):
        raise InputError(
            f"{path} is not a checkpoint, is truncated, or holds objects that are not safe to load."
        ) from None


def is_foreign(path: str | Path) -> bool:
    """Whether a file holds weights but is not a checkpoint of ``lssl fit``.

    Raises:
        InputError: for a file that is missing, truncated, or not safe to load.
    """
    content = _load(path)
    return isinstance(content, Mapping) and "lssl" not in content


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU; nothing in the file can run code.

    Raises:
        InputError: for a file without tensors.
    """
    content = _load(path)
    for nest in NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
    found = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not found:
        raise InputError(f"{path} holds no tensors by name, neither at its top nor under {', '.join(NESTS)}.")
    return found


def renamed(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """A file's tensors under the names of a network.

    Every dialect (:func:`dialects`) and every prefix of either side is tried (``module.``, ``backbone.network.``,
    ``encoder.``, …). What gives most weights of the same name and shape wins; of equals, the shortest prefixes.

    Args:
        theirs: tensors of the file.
        ours: tensors of the network.

    Returns:
        The tensors that have a name of the network, by that name; and in words how their names were read.
    """
    best: tuple[int, int] = (-1, 0)
    found: tuple[dict[str, Tensor], str] = ({}, "")
    beginnings = _prefixes(ours)
    for dialect, spoken in dialects(theirs):
        for old in _prefixes(spoken):
            inner = {name[len(old) :]: value for name, value in spoken.items() if name.startswith(old)}
            if sum(value.numel() for value in inner.values()) < best[0]:  # even if all of it fitted
                continue
            for new in beginnings:
                moved = {new + name: value for name, value in inner.items() if new + name in ours}
                fits = sum(value.numel() for name, value in moved.items() if value.shape == ours[name].shape)
                if (fits, -len(old + new)) > best:
                    how = f"names '{old}*' read as '{new}*'" if old or new else ""
                    best, found = (fits, -len(old + new)), (moved, ", ".join(word for word in (dialect, how) if word))
    return found


def dialects(theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The file's tensors by its own names, and by those that the same layers have in MONAI.

    Yields:
        How they are read, and the tensors.
    """
    yield "", dict(theirs)
    if any(".mlp.fc1." in name for name in theirs):  # Swin transformers of timm, and MONAI's published SSL weights
        names = {name: name.replace(".mlp.fc", ".mlp.linear") for name in theirs}
        yield "Swin blocks 'mlp.fc' read as MONAI's 'mlp.linear'", {names[name]: theirs[name] for name in theirs}
    if plain := _as_dynunet(theirs):
        yield "nnU-Net's PlainConvUNet read as MONAI's DynUNet", plain


def _as_dynunet(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PlainConvUNet's tensors by DynUNet's names; biases before instance norm have no effect and are left out."""
    named: dict[str, Tensor] = {}
    stages = [int(found[1]) for name in theirs if (found := re.search(r"(?<!decoder\.)encoder\.stages\.(\d+)\.", name))]
    for name, value in theirs.items():
        found = re.search(r"(decoder\.)?encoder\.stages\.(\d+)\.0\.convs\.(\d)\.(conv|norm)\.(\w+)$", name)
        if found and not found[1]:
            stage, number, part, leaf = int(found[2]), int(found[3]) + 1, found[4], found[5]
            level = "input_block" if not stage else "bottleneck" if stage == max(stages) else f"downsamples.{stage - 1}"
            named[f"{level}.{_layer(part, number)}.{leaf}"] = value
        elif found := re.search(r"decoder\.stages\.(\d+)\.convs\.(\d)\.(conv|norm)\.(\w+)$", name):
            named[f"upsamples.{found[1]}.conv_block.{_layer(found[3], int(found[2]) + 1)}.{found[4]}"] = value
        elif found := re.search(r"decoder\.transpconvs\.(\d+)\.(\w+)$", name):
            named[f"upsamples.{found[1]}.transp_conv.conv.{found[2]}"] = value
    return named if stages else {}


def _layer(part: str, number: int) -> str:
    return f"conv{number}.conv" if part == "conv" else f"norm{number}"


def _prefixes(state: Mapping[str, Tensor]) -> list[str]:
    """Beginnings of names up to a dot; the empty one is first."""
    modules = [name.split(".")[:-1] for name in state]
    return sorted({"".join(f"{part}." for part in parts[:n]) for parts in modules for n in range(DEPTH + 1)})
