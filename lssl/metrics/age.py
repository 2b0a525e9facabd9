"""How well embeddings predict age."""

from __future__ import annotations

import torch
from torch import Tensor

from lssl.metrics.visits import VisitMetric, out_of_fold

__all__ = ["AgeR2"]


class AgeR2(VisitMetric):
    """R² of a ridge regression from standardised embeddings to age, for subjects that it was not fitted on.

    Cross-validated by subject (:func:`lssl.metrics.visits.out_of_fold`): otherwise a subject's other visits would tell
    its age. 0 or less for embeddings without information about age.
    """

    def compute(self) -> Tensor:
        """NaN with fewer than three subjects of known age."""
        rows, subject, age, _ = self.visits()
        known = ~age.isnan()
        rows, subject, age = rows[known], subject[known], age[known]
        if len(subject.unique()) < 3:
            return torch.full((), float("nan"), device=rows.device)
        residual = age - out_of_fold(rows, age, subject, intercept=True)
        return (1 - residual.square().sum() / (age - age.mean()).square().sum()).float()
