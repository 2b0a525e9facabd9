"""Covariance penalty of VICReg."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Covariance"]


class Covariance(nn.Module):
    """``Σ_views (1/D) Σ_{i≠j} Cov_ij²``: penalises dimensions that repeat each other.

    VICReg (Bardes et al., ICLR 2022, eq. 3-4); the covariance runs over all rows of one view, with 1/(N - 1). Ren et
    al. (NeurIPS 2022) use it at decoder taps. With fewer rows than dimensions it cannot reach 0: for standardised rows
    its minimum is ``D/(N - 1) - 1`` per view.

    Paper: https://arxiv.org/abs/2105.04906. Reference code: https://github.com/facebookresearch/vicreg.

    Example:
        >>> import torch
        >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> Covariance()(z, z).item()
        0.0
    """

    def forward(self, z1: Tensor, z2: Tensor, used1: Tensor | None = None, used2: Tensor | None = None) -> Tensor:
        """Loss of un-normalised projections ``(N, D)`` of each view; ``(N,)`` masks say which rows count (all)."""
        with torch.autocast(z1.device.type, enabled=False):
            return self._one(z1.float(), used1) + self._one(z2.float(), used2)

    @staticmethod
    def _one(z: Tensor, used: Tensor | None) -> Tensor:
        used = z.new_ones(len(z)) if used is None else used.to(z.dtype)
        rows = used.sum()
        z = used[:, None] * (z - (used[:, None] * z).sum(0) / rows.clamp_min(1))
        covariance = z.T @ z / (rows - 1).clamp_min(1)
        return (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]
