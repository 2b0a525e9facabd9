"""Distance between matched points and the true ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

__all__ = ["LandmarkError"]


class LandmarkError(Metric):
    """Median and mean distance in mm between matched places and the true ones.

    Example:
        >>> import torch
        >>> error = LandmarkError()
        >>> error.update(torch.tensor([[[3.0, 4.0, 0.0], [0.0, 0.0, 1.0]]]), torch.zeros(1, 2, 3))
        >>> {name: value.item() for name, value in error.compute().items()}
        {'median': 3.0, 'mean': 3.0}
    """

    full_state_update = False
    higher_is_better = False
    distances: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("distances", default=[], dist_reduce_fx="cat")

    def update(self, points_mm: Tensor, truth: Tensor, valid: Tensor | None = None) -> None:
        """Adds points.

        Args:
            points_mm: ``(..., 3)`` mm.
            truth: ``(..., 3)`` mm.
            valid: ``(...)`` bool, the points that count; ``None`` counts all.
        """
        distance = (points_mm.double() - truth.double()).norm(dim=-1)
        self.distances.append(distance.flatten() if valid is None else distance[valid])

    def compute(self) -> dict[str, Tensor]:
        """``median`` (of an even number, the mean of the middle two) and ``mean``; NaN without points."""
        distance = dim_zero_cat(self.distances) if self.distances else torch.empty(0, dtype=torch.float64)
        if not len(distance):
            return {name: torch.tensor(float("nan")) for name in ("median", "mean")}
        return {"median": distance.quantile(0.5), "mean": distance.mean()}
