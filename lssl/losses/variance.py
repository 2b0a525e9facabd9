"""Variance hinge of VICReg."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Variance", "sum_of_views"]


def sum_of_views(
    each: Callable[[Tensor, Tensor], Tensor], z1: Tensor, z2: Tensor, used1: Tensor | None, used2: Tensor | None
) -> Tensor:
    """The sum of ``each(z, used)`` over both views, at once if they have equally many rows.

    Args:
        each: gets float32 rows ``(V, ..., N, D)`` and ``(V, ..., N)``, 1 for those that count; gives ``(V, ...)``.
        z1: ``(..., N, D)`` rows of view 1.
        z2: those of view 2.
        used1: ``(..., N)`` mask of the rows that count; ``None`` for all.
        used2: that of view 2.
    """
    rows = [z1.float(), z2.float()]
    masks = [
        z.new_ones(z.shape[:-1]) if used is None else used.to(z.dtype)
        for z, used in zip(rows, (used1, used2), strict=True)
    ]
    if z1.shape == z2.shape:
        return each(torch.stack(rows), torch.stack(masks)).sum(0)
    return sum(each(z[None], used[None])[0] for z, used in zip(rows, masks, strict=True))  # type: ignore[return-value]


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
        """Loss of un-normalised projections of each view.

        Args:
            z1: ``(..., N, D)`` rows of view 1; there is one loss for each leading index.
            z2: those of view 2.
            used1: ``(..., N)`` mask of the rows that count; ``None`` for all.
            used2: that of view 2.
        """
        with torch.autocast(z1.device.type, enabled=False):
            return 0.5 * sum_of_views(self._each, z1, z2, used1, used2)

    def _each(self, z: Tensor, used: Tensor) -> Tensor:
        rows, used = used.sum(-1, keepdim=True), used[..., None]
        mean = (used * z).sum(-2) / rows.clamp_min(1)
        variance = (used * (z - mean[..., None, :]).square()).sum(-2) / (rows - 1).clamp_min(1)
        return (rows[..., 0] > 1) * (1 - (variance + self.eps).sqrt()).relu().mean(-1)
