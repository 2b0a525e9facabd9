"""Precisions of the trainer that cannot train here, refused before they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lssl.utils.errors import InputError

__all__ = ["check_precision"]


def check_precision(
    precision: str, device: torch.device, size: Sequence[int], strides: Mapping[str, Sequence[int]]
) -> None:
    """Raises InputError if a step would fail or be wrong.

    Lightning's ``bf16-true``, ``16-true`` and ``64-true`` convert the whole batch, so places in mm lose their digits
    and views are float32 whatever the network is. OneDNN's bfloat16 gradient of a 3D kernel reads uninitialised memory
    on CPU maps of 1 or 2 voxels a side: torch 2.13 gives NaN or a different value at every call. Larger maps are exact
    to the bit.

    Args:
        precision: the trainer's.
        device: of the network.
        size: voxels of a view per axis.
        strides: tap → its stride per axis.
    """
    if precision.endswith("-true") and precision != "32-true":
        raise InputError(
            f"trainer.precision: {precision} would convert the visits' places, too; choose 32-true, bf16-mixed or "
            "16-mixed."
        )
    if device.type != "cpu" or "bf16" not in precision:
        return
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        rank_zero_warn(
            f"trainer.precision: {precision} may take a hundred times as long as 32-true on this CPU, which has no "
            "instructions for bfloat16."
        )
    for name, stride in strides.items():
        if any(side // step <= 2 for side, step in zip(size, stride, strict=True)):
            raise InputError(
                f"trainer.precision: bfloat16 gradients are wrong on CPUs if a map has 2 voxels a side, as tap "
                f"'{name}' has here; use larger views or trainer.precision 32."
            )
