"""Dice of a linear classifier on features of single voxels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

__all__ = ["LabelProbe"]


class LabelProbe(Metric):
    """Mean Dice of labels predicted for voxels by a linear classifier on their features, for subjects not fitted on.

    Ridge regression from standardised features to one-hot labels, in closed form, fitted on one half of the subjects
    (every second id) and scored on the other, and the reverse; the largest output wins. Dice is of the drawn voxels and
    averaged over the labels above 0 that both halves hold, then over both halves.

    Args:
        ridge: penalty on standardised features, as a share of the number of rows.
        **kwargs: see :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    higher_is_better = True
    features: list[Tensor]
    labels: list[Tensor]
    subjects: list[Tensor]

    def __init__(self, ridge: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ridge = ridge
        for name in ("features", "labels", "subjects"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, labels: Tensor, subject: Tensor) -> None:
        """Adds voxels.

        Args:
            features: ``(N, C)``.
            labels: ``(N,)`` integers, 0 for the background.
            subject: ``(N,)`` subject ids.
        """
        self.features.append(features.float())
        self.labels.append(labels.long())
        self.subjects.append(subject)

    def compute(self) -> Tensor:
        """Mean Dice; NaN with fewer than two subjects or without a common label."""
        subject = torch.unique(dim_zero_cat(self.subjects), return_inverse=True)[1]
        rows, labels = dim_zero_cat(self.features).double(), dim_zero_cat(self.labels)
        halves = [(rows[subject % 2 == half], labels[subject % 2 == half]) for half in (0, 1)]
        if not all(len(half) for half, _ in halves):
            return torch.full((), float("nan"), device=rows.device)
        return torch.stack([self._score(*halves[0], *halves[1]), self._score(*halves[1], *halves[0])]).mean().float()

    def _score(self, rows: Tensor, labels: Tensor, other: Tensor, truth: Tensor) -> Tensor:
        """Fits on the first half, scores on the second."""
        names, number = labels.unique(return_inverse=True)
        mean, scale = rows.mean(0), rows.std(0).clamp_min(1e-8)
        x, y = (rows - mean) / scale, F.one_hot(number, len(names)).double()
        penalty = self.ridge * len(x) * torch.eye(x.shape[1]).to(x)
        slope = torch.linalg.solve(x.T @ x + penalty, x.T @ (y - y.mean(0)))
        found = names[((other - mean) / scale @ slope + y.mean(0)).argmax(1)]
        scored = [name for name in names if name > 0 and (truth == name).any()]
        dice = [2 * ((found == k) & (truth == k)).sum() / ((found == k).sum() + (truth == k).sum()) for k in scored]
        return torch.stack(dice).mean() if dice else torch.full((), float("nan"), device=rows.device)
