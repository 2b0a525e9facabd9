"""Alignment and uniformity of features on the sphere (Wang & Isola, ICML 2020)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

__all__ = ["Alignment", "Uniformity"]


class _MeanOfPairs(Metric):
    """A mean of something over pairs of rows, as a sum and a number."""

    full_state_update = False
    higher_is_better = False
    total: Tensor
    pairs: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")


class Alignment(_MeanOfPairs):
    """Mean of ``‖x - y‖²`` over corresponding L2-normalised rows: 0 if they agree, 2 if they have nothing in common."""

    def update(self, one: Tensor, other: Tensor) -> None:
        """Adds corresponding rows ``(N, C)``."""
        one, other = (F.normalize(rows.double(), dim=1) for rows in (one, other))
        self.total += (one - other).square().sum()
        self.pairs += len(one)

    def compute(self) -> Tensor:
        """The mean; NaN without rows."""
        return (self.total / self.pairs).float()


class Uniformity(_MeanOfPairs):
    """``log mean exp(-2 ‖x - y‖²)`` over pairs of different L2-normalised rows of one update.

    0 if all rows are one point; near -4 if they fill a sphere of many dimensions. Low alignment with low uniformity
    is wanted; a collapse has alignment 0 and uniformity 0.
    """

    def update(self, features: Tensor) -> None:
        """Adds rows ``(N, C)``, of one image for instance; they are compared among themselves."""
        rows, n = F.normalize(features.double(), dim=1), len(features)
        distance = (2 - 2 * rows @ rows.T).clamp_min(0).fill_diagonal_(0)
        self.total += (-2 * distance).exp().sum() - n
        self.pairs += n * (n - 1)

    def compute(self) -> Tensor:
        """The logarithm; NaN without pairs."""
        return (self.total / self.pairs).log().float()
