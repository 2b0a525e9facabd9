"""Covariance penalty of VICReg."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lssl.losses.variance import sum_of_views

__all__ = ["Covariance"]


class Covariance(nn.Module):
    """``Σ_views (1/D) Σ_{i≠j} Cov_ij²``: penalises dimensions that repeat each other.

    VICReg (Bardes et al., ICLR 2022, eq. 3-4); the covariance runs over all rows of one view, with 1/(N - 1). Ren et
    al. (NeurIPS 2022) use it at decoder taps. With fewer rows than dimensions it cannot reach 0: for standardised rows
    its minimum is ``D/(N - 1) - 1`` per view.

    With fewer rows than dimensions the sum is taken over products of rows, ``‖ZᵀZ‖² = ‖ZZᵀ‖²``: of 128 rows with 2048
    dimensions, a sixteenth of the work.

    Paper: https://arxiv.org/abs/2105.04906. Reference code: https://github.com/facebookresearch/vicreg.

    Example:
        >>> import torch
        >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> Covariance()(z, z).item()
        0.0
    """

    def forward(self, z1: Tensor, z2: Tensor, used1: Tensor | None = None, used2: Tensor | None = None) -> Tensor:
        """Loss of un-normalised projections ``(..., N, D)`` of each view, see :class:`Variance`, with its masks."""
        with torch.autocast(z1.device.type, enabled=False):
            return sum_of_views(self._each, z1, z2, used1, used2)

    @staticmethod
    def _each(z: Tensor, used: Tensor) -> Tensor:
        used = used[..., None]
        rows = used.sum(-2, keepdim=True)
        z = used * (z - (used * z).sum(-2, keepdim=True) / rows.clamp_min(1))
        few = z.shape[-2] < z.shape[-1]
        products = z @ z.mT if few else z.mT @ z
        own = z.square().sum(-2) if few else products.diagonal(dim1=-2, dim2=-1)
        unlike = products.square().sum((-2, -1)) - own.square().sum(-1)
        return unlike / ((rows[..., 0, 0] - 1).clamp_min(1).square() * z.shape[-1])
