"""Weights that lssl did not write: a plain state_dict or safetensors file, renamed to fit a network."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lssl.utils.errors import InputError

__all__ = ["is_foreign", "read_weights", "renamed"]

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


def renamed(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str, str]:
    """A file's tensors under the names of a network.

    Every prefix of either side is tried (``module.``, ``backbone.network.``, ``encoder.``, …). The pair that gives most
    weights of the same name and shape wins; of equal pairs, the shortest.

    Args:
        theirs: tensors of the file.
        ours: tensors of the network.

    Returns:
        The tensors below the file's prefix that have a name of the network, by that name; the file's prefix; and the
        prefix of the network that replaces it.
    """
    best: tuple[int, int] = (-1, 0)
    found: tuple[dict[str, Tensor], str, str] = ({}, "", "")
    beginnings = _prefixes(ours)
    for old in _prefixes(theirs):
        inner = {name[len(old) :]: value for name, value in theirs.items() if name.startswith(old)}
        if sum(value.numel() for value in inner.values()) < best[0]:  # even if all of it fitted
            continue
        for new in beginnings:
            moved = {new + name: value for name, value in inner.items() if new + name in ours}
            fits = sum(value.numel() for name, value in moved.items() if value.shape == ours[name].shape)
            if (fits, -len(old + new)) > best:
                best, found = (fits, -len(old + new)), (moved, old, new)
    return found


def _prefixes(state: Mapping[str, Tensor]) -> list[str]:
    """Beginnings of names up to a dot; the empty one is first."""
    modules = [name.split(".")[:-1] for name in state]
    return sorted({"".join(f"{part}." for part in parts[:n]) for parts in modules for n in range(DEPTH + 1)})
