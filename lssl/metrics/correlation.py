"""Correlation between channels."""

from __future__ import annotations

import torch
from torch import Tensor

from lssl.metrics.moments import Moments

__all__ = ["ChannelCorrelation"]


class ChannelCorrelation(Moments):
    """Mean of ``|ρ_ij|`` over pairs of channels ``i ≠ j``, ρ their Pearson correlation over rows.

    0 for channels that each say something of their own, 1 if all say the same (Barlow Twins, Zbontar et al., ICML
    2021, trains it towards 0). Channels that never change have no correlation and are left out; NaN if fewer than two
    are left.
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The mean."""
        scatter = self.scatter()
        variance = scatter.diagonal()
        alive = variance > 1e-12 * self.products.diagonal()  # what rounding leaves of zero counts as zero
        scale = variance.where(alive, 1.0).sqrt()
        size = (scatter / torch.outer(scale, scale)).abs()
        both = torch.outer(alive, alive).fill_diagonal_(False)
        return size[both].mean().float()
