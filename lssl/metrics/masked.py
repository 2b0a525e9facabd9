"""Means over masked voxels, and how much of their variance a reconstruction explains."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["explained_share", "masked_mean"]


def masked_mean(values: Tensor, chosen: Tensor) -> Tensor:
    """``(B,)`` means of ``values (B, C, ...)`` over the chosen voxels ``(B, 1, ...)`` of each sample."""
    axes = tuple(range(1, values.ndim))
    return (values * chosen).sum(axes) / chosen.expand_as(values).sum(axes)


@torch.no_grad()
def explained_share(squares: Tensor, clean: Tensor, masked: Tensor) -> Tensor:
    """Explained share of the masked voxels' variance about each view's own mean, the best constant prediction.

    Args:
        squares: ``(B,)`` mean squared difference of prediction and truth over the masked voxels.
        clean: ``(B, C, ...)`` the truth.
        masked: ``(B, 1, ...)`` voxels that count.

    Returns:
        A scalar: 0 for a constant, 1 for the truth.
    """
    centre = masked_mean(clean, masked).view(-1, *[1] * (clean.ndim - 1))
    return 1 - squares.sum() / masked_mean((clean - centre).square(), masked).sum()
