"""What metrics of whole visits share: one embedding per visit, and folds that keep subjects together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

__all__ = ["VisitMetric", "auc", "out_of_fold", "visit_pairs"]


class VisitMetric(Metric):
    """Collects one embedding per visit; a visit that is added twice counts once."""

    full_state_update = False
    higher_is_better = True
    embeddings: list[Tensor]
    subjects: list[Tensor]
    sessions: list[Tensor]
    ages: list[Tensor]
    times: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("embeddings", "subjects", "sessions", "ages", "times"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self,
        embedding: Tensor,
        subject: Tensor,
        session: Tensor,
        age: Tensor | None = None,
        time: Tensor | None = None,
    ) -> None:
        """Adds visits.

        Args:
            embedding: ``(B, C)``.
            subject: ``(B,)`` subject ids.
            session: ``(B,)`` visit ids.
            age: ``(B,)`` years, NaN where unknown; ``None``: unknown.
            time: ``(B,)`` years since the subject's first visit, likewise.
        """
        unknown = torch.full(subject.shape, float("nan"), device=subject.device)
        self.embeddings.append(embedding.float())
        self.subjects.append(subject)
        self.sessions.append(session)
        self.ages.append(unknown if age is None else age.float())
        self.times.append(unknown if time is None else time.float())

    def visits(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Standardised embeddings ``(V, C)`` float64, subjects, ages and times ``(V,)``, in order of visit ids."""
        sessions = dim_zero_cat(self.sessions)
        order = sessions.argsort(stable=True)
        first = torch.ones_like(order, dtype=torch.bool)
        first[1:] = sessions[order][1:] != sessions[order][:-1]
        keep = order[first]
        embedding = dim_zero_cat(self.embeddings)[keep].double()
        deviation = embedding.std(0) if len(keep) > 1 else embedding.new_zeros(embedding.shape[1])
        standard = (embedding - embedding.mean(0)) / deviation.clamp_min(1e-8)
        ages, times = (dim_zero_cat(values)[keep].double() for values in (self.ages, self.times))
        return standard, dim_zero_cat(self.subjects)[keep], ages, times

    def similarities(self) -> tuple[Tensor, Tensor]:
        """Cosines of all visits ``(V, V)``, -∞ on the diagonal, and which two are of one subject."""
        standard, subject, *_ = self.visits()
        unit = F.normalize(standard, dim=1)
        similarity = (unit @ unit.T).fill_diagonal_(float("-inf"))
        return similarity, (subject[:, None] == subject).fill_diagonal_(False)


def visit_pairs(subject: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the earlier and the later visit of all pairs of one subject whose times are known and differ."""
    pairs = ((subject[:, None] == subject) & (time[:, None] < time)).nonzero()
    return pairs[:, 0], pairs[:, 1]


def auc(positive: Tensor, negative: Tensor) -> Tensor:
    """Probability that a positive score exceeds a negative one, ties counting half; NaN if either is missing."""
    if not len(positive):
        return torch.full((), float("nan"), device=positive.device)
    order = negative.sort().values
    below = torch.searchsorted(order, positive) + torch.searchsorted(order, positive, right=True)
    return (below.double().mean() / (2 * len(negative))).float()


def out_of_fold(
    rows: Tensor, target: Tensor, subject: Tensor, intercept: bool, ridge: float = 1.0, folds: int = 5
) -> Tensor:
    """Predictions ``(N,)`` of a ridge regression for subjects that it was not fitted on.

    Subjects are dealt out to the folds in the order of their ids. Solved in the rows' inner products, as there are far
    fewer visits than channels; the penalty is ``ridge`` times their mean square, so units do not matter.

    Args:
        rows: ``(N, C)`` float64.
        target: ``(N,)`` float64.
        subject: ``(N,)`` ids.
        intercept: fit a constant, too.
        ridge: share of the penalty.
        folds: number of folds; fewer if there are fewer subjects.
    """
    number = torch.unique(subject, return_inverse=True)[1]
    fold = number % min(folds, int(number.max()) + 1)
    found = torch.zeros_like(target)
    for held_out in fold.unique():
        test = fold == held_out
        fit, y = rows[~test], target[~test]
        centre, level = (fit.mean(0), y.mean()) if intercept else (torch.zeros_like(rows[0]), torch.zeros_like(y[0]))
        fit = fit - centre
        products = fit @ fit.T
        penalty = (ridge * products.diagonal().mean()).clamp_min(1e-12)
        weight = torch.linalg.solve(products + penalty * torch.eye(len(fit)).to(products), y - level)
        found[test] = (rows[test] - centre) @ (fit.T @ weight) + level
    return found
