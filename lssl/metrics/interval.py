"""Correlation between the distance of a subject's embeddings and the time between its visits."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from lssl.metrics.visits import VisitMetric, visit_pairs

__all__ = ["IntervalCorrelation"]


class IntervalCorrelation(VisitMetric):
    """Spearman's rank correlation of ``‖x - y‖`` and ``|Δt|`` over all pairs of visits of one subject.

    x and y are standardised embeddings. 1 if distance grows with time; 0 if it has nothing to do with it.
    """

    def compute(self) -> Tensor:
        """NaN with fewer than three pairs of known interval, or where all distances or all intervals are one."""
        rows, subject, _, time = self.visits()
        earlier, later = visit_pairs(subject, time)
        distance, interval = (rows[later] - rows[earlier]).norm(dim=1), time[later] - time[earlier]
        if len(interval) < 3 or distance.max() == distance.min() or interval.max() == interval.min():
            return torch.full((), float("nan"), device=rows.device)
        return spearman_corrcoef(distance, interval).float()
