"""Voxel-wise cosine loss between a prediction and an aligned target."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lssl.losses.cosine import cosine
from lssl.utils.distributed import weighted_mean

__all__ = ["AlignedCosine"]


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

    def forward(self, query: Tensor, target: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        """Loss of one direction, or of several at leading indices.

        Args:
            query: ``(..., B, N, D)`` predictions.
            target: ``(..., B, N, D)`` targets at the same points; they receive no gradient.
            valid: ``(..., B, N)`` bool, true for the voxels of Ω.
            weight: ``(..., B)`` weight of each sample in the mean; 0 for a sample with too few voxels.
        """
        with torch.autocast(query.device.type, enabled=False):
            distance = 2 - 2 * cosine(query.float(), target.detach().float())
            per_sample = (distance * valid).sum(-1) / valid.sum(-1).clamp_min(1)
            return weighted_mean(per_sample, weight)
