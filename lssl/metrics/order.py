"""Whether embeddings tell which of two visits came first."""

from __future__ import annotations

import torch
from torch import Tensor

from lssl.metrics.visits import VisitMetric, auc, out_of_fold, visit_pairs

__all__ = ["OrderAUC"]


class OrderAUC(VisitMetric):
    """AUC of a linear score of ``later - earlier`` against that of ``earlier - later``, for subjects not fitted on.

    The score is a ridge regression through the origin from differences of standardised embeddings to 1, cross-validated
    by subject (:func:`lssl.metrics.visits.out_of_fold`). ½ for embeddings that hold no sign of ageing that is common to
    subjects.
    """

    def compute(self) -> Tensor:
        """NaN with fewer than two subjects of two visits."""
        rows, subject, _, time = self.visits()
        earlier, later = visit_pairs(subject, time)
        owner = subject[later]
        if len(owner.unique()) < 2:
            return torch.full((), float("nan"), device=rows.device)
        difference = rows[later] - rows[earlier]
        score = out_of_fold(difference, torch.ones_like(difference[:, 0]), owner, intercept=False)
        return auc(score, -score)
