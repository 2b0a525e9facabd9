"""Whether a voxel finds itself in another view."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

__all__ = ["MatchingAccuracy"]


class MatchingAccuracy(Metric):
    """Share of points of one view whose most similar point of the other view, by cosine, is the corresponding one.

    A constant representation finds the first candidate every time: one point of each update, as chance does.
    Near 1 in the first steps of training it means that there is an easier way than anatomy; see
    :class:`lssl.metrics.PositionR2` on noise.
    """

    full_state_update = False
    higher_is_better = True
    found: Tensor
    points: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("found", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("points", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, one: Tensor, other: Tensor) -> None:
        """Adds the features ``(K, C)`` of different points in both views; they are compared among themselves."""
        if not len(one):
            return
        similarity = F.normalize(one.float(), dim=1) @ F.normalize(other.float(), dim=1).T
        self.found += (similarity.argmax(1) == torch.arange(len(one), device=one.device)).sum()
        self.points += len(one)

    def compute(self) -> Tensor:
        """The share; NaN without points."""
        return self.found.float() / self.points
