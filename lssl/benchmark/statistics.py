"""Paired differences between rows, and how far chance alone would carry them; without torch.

Two rows are compared on the same seeds and the same test subjects. Both are samples, so both are drawn anew: an
interval over subjects alone is too narrow, as it takes the seeds at hand (pretraining, labelled subject, initial
weights) for all there are. With ``x[s, n]`` the difference at seed ``s`` and subject ``n``, a draw takes S seeds and N
subjects with replacement, independently, and is the mean of ``x`` over their product; the interval holds the middle
95 % of the draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

__all__ = ["Difference", "paired", "two_way"]

DRAWS = 10_000


@dataclass(frozen=True)
class Difference:
    """The mean difference of two rows, its 95 % interval, and how many seeds and subjects it rests on."""

    mean: float
    low: float
    high: float
    seeds: int
    subjects: int

    @property
    def above(self) -> bool:
        """Whether the interval lies above 0."""
        return self.low > 0

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired(scores: pd.DataFrame, reference: pd.DataFrame) -> Difference | None:
    """``scores`` less ``reference``, both seeds × subjects, on the seeds and subjects that both have.

    A seed or subject that lacks a value anywhere is left out: seeds of which nothing is there first, then subjects.
    """
    common = scores.sub(reference).dropna(axis=0, how="all").dropna(axis=1)
    if common.empty:
        return None
    low, high = two_way(common.to_numpy(float))
    return Difference(float(common.to_numpy().mean()), low, high, *common.shape)


def two_way(difference: np.ndarray, draws: int = DRAWS, level: float = 0.95) -> tuple[float, float]:
    """Interval of the mean of ``(seeds, subjects)`` under a bootstrap of both; of one seed, under one of subjects.

    The mean over a product of draws is ``u' x v / (S N)`` with ``u`` and ``v`` how often each was drawn.
    """
    draw = np.random.default_rng(0)
    seeds, subjects = difference.shape
    often_seed = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
    often_subject = draw.multinomial(subjects, np.full(subjects, 1 / subjects), size=draws)
    means = np.einsum("ds,sn,dn->d", often_seed, difference, often_subject, optimize=True) / difference.size
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
