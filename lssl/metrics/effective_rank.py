"""Effective rank of features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["EffectiveRank"]


class EffectiveRank(Metric):
    """``exp(-Σ p_i log p_i)``, ``p_i = σ_i / Σ σ``, with σ the singular values of the centred feature matrix.

    RankMe (Garrido et al., ICML 2023), on centred features, so that a common offset does not hide a collapse. Between
    1 and the number of channels; 1 or NaN for features on a line or a point. Kept as sums: constant memory.

    Args:
        channels: number of channels.
        **kwargs: see :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    higher_is_better = True
    count: Tensor
    total: Tensor
    products: Tensor

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(channels, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(channels, channels, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Adds rows ``(N, C)``."""
        features = features.double()
        self.count += len(features)
        self.total += features.sum(0)
        self.products += features.T @ features

    def compute(self) -> Tensor:
        """The effective rank."""
        mean = self.total / self.count
        scatter = self.products - self.count * torch.outer(mean, mean)
        values = torch.linalg.eigvalsh(scatter)
        sigma = values.clamp_min(values[-1] * 1e-12).sqrt()  # what rounding leaves of zero counts as zero
        p = sigma / sigma.sum()
        return torch.special.entr(p).sum().exp().float()
