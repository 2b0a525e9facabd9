"""First and second moments of feature rows: what several metrics of a covariance share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["Moments"]


class Moments(Metric):
    """Count, sum and products of rows in float64: constant memory however many rows, and sums over processes.

    Args:
        channels: number of channels.
        **kwargs: see :class:`torchmetrics.Metric`.
    """

    full_state_update = False
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

    def scatter(self) -> Tensor:
        """``(C, C)``: sum over rows of the outer products of what is left after the mean is taken off."""
        mean = self.total / self.count.clamp_min(1)
        return self.products - self.count * torch.outer(mean, mean)
