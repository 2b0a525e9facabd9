"""Voxel-wise cosine loss between a prediction and an aligned target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lssl.losses.cosine import cosine
from lssl.utils.distributed import weighted_mean

__all__ = ["AlignedCosine", "mean_of_valid", "sums_of_sets"]


class AlignedCosine(nn.Module):
    """``mean_b (1/|Ω_b|) Σ_{x∈Ω_b} (2 - 2 cos(q(x), sg t(x)))``; in [0, 4], lower is better.

    BYOL's loss (Grill et al., NeurIPS 2020, eq. 2) at every voxel x that both views show, as in PGL (Xie et al.,
    arXiv 2011.12640). Each voxel's vector is normalised. Each sample's sum is divided by its own number of voxels.

    Papers: https://arxiv.org/abs/2006.07733 and https://arxiv.org/abs/2011.12640. Reference code:
    https://github.com/google-deepmind/deepmind-research/tree/master/byol.

    Example:
        >>> import torch
        >>> q = torch.randn(2, 5, 8)
        >>> round(AlignedCosine()(q, -3 * q, torch.ones(2, 5, dtype=torch.bool), torch.ones(2)).item(), 4)
        4.0
    """

    def forward(
        self, query: Tensor, target: Tensor, valid: Tensor, weight: Tensor, counts: Sequence[int] | None = None
    ) -> Tensor:
        """Loss of one direction, or of several at leading indices.

        Args:
            query: ``(..., B, N, D)`` predictions.
            target: ``(..., B, N, D)`` targets at the same points; they receive no gradient.
            valid: ``(..., B, N)`` bool, true for the voxels of Ω.
            weight: ``(..., B)`` weight of each sample in the mean; 0 for a sample with too few voxels.
            counts: number of points of each of T sets that follow one another, whose sum is N. The weights are then
                ``(..., T, B)``, and there are T losses.
        """
        with torch.autocast(query.device.type, enabled=False):
            distance = 2 - 2 * cosine(query.float(), target.detach().float())
            return weighted_mean(mean_of_valid(distance, valid, counts), weight)


def mean_of_valid(values: Tensor, valid: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """``(..., B)`` means of ``values (..., B, N)`` over valid points, 0 where there are none.

    With ``counts`` they are those of T sets of points, ``(..., T, B)``; see :class:`AlignedCosine`.
    """
    if counts is None:
        return (values * valid).sum(-1) / valid.sum(-1).clamp_min(1)
    return sums_of_sets(values * valid, counts) / sums_of_sets(valid, counts).clamp_min(1)


def sums_of_sets(values: Tensor, counts: Sequence[int]) -> Tensor:
    """``(..., T, B)`` sums of ``values (..., B, N)`` over T sets of points that follow one another."""
    return torch.stack([part.sum(-1) for part in values.split(list(counts), -1)], -2)
