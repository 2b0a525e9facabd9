"""Negative cosine similarity with stop-gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lssl.losses.cosine import cosine
from lssl.utils.distributed import weighted_mean

__all__ = ["NegativeCosine"]


class NegativeCosine(nn.Module):
    """``½ mean[-cos(p₁, sg z₂)] + ½ mean[-cos(p₂, sg z₁)]``; in [-1, 1], lower is better.

    The mean runs over samples and points; ``sg`` stops the gradient. SimSiam (Chen & He, CVPR 2021); Ren et al.
    (NeurIPS 2022) use it per voxel and tap.

    Papers: https://arxiv.org/abs/2011.10566 and https://arxiv.org/abs/2206.04281. Reference code:
    https://github.com/facebookresearch/simsiam and https://github.com/mengweiren/longitudinal-representation-learning.

    Example:
        >>> import torch
        >>> z = torch.randn(2, 5, 8)
        >>> round(NegativeCosine()(z, z, z, z).item(), 4)
        -1.0
    """

    def forward(self, p1: Tensor, z1: Tensor, p2: Tensor, z2: Tensor, weight: Tensor | None = None) -> Tensor:
        """Loss of predictions and projections ``(..., B, K, D)`` at K corresponding points, one for each leading index.

        Args:
            p1: predictions of view 1.
            z1: projections of view 1.
            p2: predictions of view 2.
            z2: projections of view 2.
            weight: ``(..., B)`` weight of each sample in the mean; 0 for a sample without corresponding points.
        """
        with torch.autocast(p1.device.type, enabled=False):
            predicted, seen = torch.stack([p1, p2]).float(), torch.stack([z2, z1]).detach().float()
            return weighted_mean(-cosine(predicted, seen).mean((0, -1)), weight)
