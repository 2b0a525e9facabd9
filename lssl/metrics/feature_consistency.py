"""Similarity of features at the same point in two visits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

__all__ = ["FeatureConsistency"]


class FeatureConsistency(Metric):
    """Mean cosine of the features of corresponding points of two visits, and of points that do not correspond.

    The mean feature of each visit is taken off first: what all of its voxels share would make any two of them alike.
    """

    full_state_update = False
    higher_is_better = True
    same: Tensor
    shuffled: Tensor
    points: Tensor
    others: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("same", "shuffled", "points", "others"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, one: Tensor, other: Tensor) -> None:
        """Adds the features ``(K, C)`` of the points of one pair of visits."""
        if not len(one):
            return
        x, y = (F.normalize(rows - rows.mean(0), dim=1) for rows in (one.double(), other.double()))
        same = (x * y).sum()
        self.same += same
        self.points += len(x)
        self.shuffled += x.sum(0) @ y.sum(0) - same  # of all i ≠ j, without forming their matrix
        self.others += len(x) * (len(x) - 1)

    def compute(self) -> dict[str, Tensor]:
        """``consistency`` and ``shuffled``, in [-1, 1]; NaN without points."""
        pairs = {"consistency": self.same / self.points, "shuffled": self.shuffled / self.others}
        return {name: value.float() for name, value in pairs.items()}
