"""Variance hinge of VICReg."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Variance"]


class Variance(nn.Module):
    """``½ Σ_views mean_d max(0, 1 - √(var_d + ε))``: penalises dimensions that become constant.

    VICReg (Bardes et al., ICLR 2022, eq. 1); the variance is unbiased and runs over all rows of one view. Ren et al.
    (NeurIPS 2022) use it at decoder taps.

    Paper: https://arxiv.org/abs/2105.04906. Reference code: https://github.com/facebookresearch/vicreg.

    Args:
        eps: added to the variance before the root.

    Example:
        >>> import torch
        >>> round(Variance()(torch.zeros(9, 4), torch.zeros(9, 4)).item(), 4)
        0.99
    """

    def __init__(self, eps: float = 1e-4) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, z1: Tensor, z2: Tensor, used1: Tensor | None = None, used2: Tensor | None = None) -> Tensor:
        """Loss of un-normalised projections ``(N, D)`` of each view; ``(N,)`` masks say which rows count (all)."""
        with torch.autocast(z1.device.type, enabled=False):
            return 0.5 * (self._one(z1.float(), used1) + self._one(z2.float(), used2))

    def _one(self, z: Tensor, used: Tensor | None) -> Tensor:
        used = z.new_ones(len(z)) if used is None else used.to(z.dtype)
        rows = used.sum()
        mean = (used[:, None] * z).sum(0) / rows.clamp_min(1)
        variance = (used[:, None] * (z - mean).square()).sum(0) / (rows - 1).clamp_min(1)
        return (rows > 1) * (1 - (variance + self.eps).sqrt()).relu().mean()
