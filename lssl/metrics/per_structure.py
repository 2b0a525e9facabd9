"""What the metrics over visits share: a mean for each structure, over the cases that count for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["PerStructure"]


class PerStructure(Metric):
    """Means over cases, one for each of K structures; ``update`` of a subclass calls :meth:`add`.

    Args:
        structures: number K of structures.
        **kwargs: see :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, structures: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("total", "count"):
            self.add_state(name, torch.zeros(structures, dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, values: Tensor, counted: Tensor) -> None:
        """Adds cases: ``values (B, K)``, of which those ``counted (B, K)`` matter."""
        self.total += values.where(counted, 0).sum(0)
        self.count += counted.sum(0)

    def compute(self) -> Tensor:
        """``(K,)``, NaN where nothing counted; torchmetrics makes ``(1,)`` a plain number."""
        return (self.total / self.count).float()
