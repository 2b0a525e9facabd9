"""Variance hinge of VICReg."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Variance"]


class Variance(nn.Module):
    """``½ Σ_views mean_d max(0, 1 - √(var_d + ε))``: no dimension may die.

    VICReg (Bardes et al., ICLR 2022, eq. 1); the variance is unbiased, over all rows of one view. On decoder taps in
    Ren et al. (NeurIPS 2022).

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

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Loss of un-normalised projections ``(N, D)`` of each view."""
        with torch.autocast(z1.device.type, enabled=False):
            return 0.5 * (self._one(z1.float()) + self._one(z2.float()))

    def _one(self, z: Tensor) -> Tensor:
        return (1 - (z.var(0) + self.eps).sqrt()).relu().mean()
