"""How much features differ from row to row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

__all__ = ["FeatureStd"]


class FeatureStd(Metric):
    """Standard deviation over rows, averaged over channels.

    Of L2-normalised rows it is given in units of ``1/√C``, which rows that fill the sphere have: 1 for them, 0 in a
    collapse, whatever the features' size (SimSiam, Chen & He, CVPR 2021). Of the features as they are it tells
    whether they shrink to nothing.

    Args:
        channels: number of channels (C).
        normalise: L2-normalise each row first.
        **kwargs: see :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    higher_is_better = True
    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, channels: int, normalise: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.normalise = normalise
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(channels, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(channels, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Adds rows ``(N, C)``."""
        rows = features.double()
        rows = F.normalize(rows, dim=1) if self.normalise else rows
        self.count += len(rows)
        self.total += rows.sum(0)
        self.squares += rows.square().sum(0)

    def compute(self) -> Tensor:
        """The standard deviation; NaN without rows."""
        variance = self.squares / self.count - (self.total / self.count).square()
        unit = len(variance) ** 0.5 if self.normalise else 1.0
        return (unit * variance.clamp_min(0).sqrt().mean()).float()
