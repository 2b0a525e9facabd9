"""Many small arrays of the host, sent to a device in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["pack", "send", "unpack"]

_TYPES = {
    "bool": torch.bool,
    "int64": torch.int64,
    "float32": torch.float32,
    "float64": torch.float64,
}
_ALIGNED = 16  # bytes; the largest element that a view may have


def send(arrays: Sequence[np.ndarray], device: torch.device | str) -> list[Tensor]:
    """Tensors of the arrays on a device, by one copy that the host does not wait for.

    Args:
        arrays: of any shapes; bool, int64, float32 or float64.
        device: of the tensors.
    """
    device, buffer = torch.device(device), pack(arrays)
    if device.type == "cuda":
        buffer = buffer.pin_memory()
    return unpack(buffer.to(device, non_blocking=True), arrays)


def pack(arrays: Sequence[np.ndarray]) -> Tensor:
    """The arrays' bytes one after another, each at a multiple of 16."""
    places = _places(arrays)
    buffer = np.zeros(places[-1], np.uint8)
    for array, start in zip(arrays, places[:-1], strict=True):
        buffer[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return torch.from_numpy(buffer)


def unpack(buffer: Tensor, arrays: Sequence[np.ndarray]) -> list[Tensor]:
    """Views of a packed buffer, of the shapes and types of the arrays."""
    return [
        buffer[start : start + array.nbytes].view(_TYPES[array.dtype.name]).view(array.shape)
        for array, start in zip(arrays, _places(arrays)[:-1], strict=True)
    ]


def _places(arrays: Sequence[np.ndarray]) -> list[int]:
    """Where each array begins, and where the last one ends."""
    places = [0]
    for array in arrays:
        places.append(places[-1] + -(-array.nbytes // _ALIGNED) * _ALIGNED)
    return places
