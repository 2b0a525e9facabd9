r"""Paired differences between rows, with intervals that cover seeds and subjects; without torch.

Two rows are compared on the same seeds and the same test subjects, and both are samples. Let ``x[s, n]`` be the
difference at seed ``s`` and cluster ``n``, a subject or a group of related ones (one family, site or label map). The
model is two-way with random effects,

.. math:: x_{sn} = \mu + a_s + b_n + e_{sn}, \qquad \mathrm{Var}(\bar x)
    = \frac{\sigma_a^2}{S} + \frac{\sigma_b^2}{N} + \frac{\sigma_e^2}{SN}.

The expected mean squares are :math:`E[MS_a] = N\sigma_a^2 + \sigma_e^2`, :math:`E[MS_b] = S\sigma_b^2 + \sigma_e^2` and
:math:`E[MS_e] = \sigma_e^2`, so the expectation of :math:`V = (MS_a + MS_b - MS_e) / (SN)` is that variance.
A combination of mean squares is approximately a multiple of chi-square with Satterthwaite's degrees of freedom (1946),

.. math:: \nu = \frac{(SN\,V)^2}{MS_a^2/(S-1) + MS_b^2/(N-1) + MS_e^2/((S-1)(N-1))},

so the interval is :math:`\bar x \pm t_{\nu, .975} \sqrt V`. Special cases:

- As no variance component is negative, ``SN V`` is never taken to be less than ``MS_a`` or ``MS_b``. This also keeps it
  above 0. ``ν`` is at least ``min(S, N) − 1``.
- One seed, or one cluster: its variance is unknown, so there is a difference and no interval.
- Missing values: seeds without any value are left out, then subjects that lack one at any seed. The rest is complete.
- Clusters weigh alike, whatever their number of subjects.

``benchmarks/bench_intervals.py`` measures the coverage: .92 to .99 with 2 to 10 seeds. A percentile bootstrap covers
.67 to .92 in the same patterns, unless the residual dominates. With 2 seeds, 6 to 10 % of the tables without any
difference still have a bold row where seeds vary as much as subjects or more; from 3 seeds on, at most 4 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

__all__ = ["METHOD", "Difference", "holm", "paired", "two_way"]

METHOD = "two-way random effects, t with Satterthwaite's degrees of freedom"


@dataclass(frozen=True)
class Difference:
    """The mean difference of two rows, with its uncertainty.

    Attributes:
        mean: over seeds and clusters.
        low: lower end of the 95 % interval; NaN without an interval.
        high: upper end.
        p: two-sided, of no difference; NaN without an interval.
        seeds: how many.
        subjects: how many.
        clusters: how many; equal to subjects if these are unrelated.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    subjects: int
    clusters: int

    @property
    def method(self) -> str:
        """How the interval was made."""
        return METHOD if self.low == self.low else "none"

    def __str__(self) -> str:
        return f"{self.mean:+.3f}" + (f" [{self.low:+.3f}, {self.high:+.3f}]" if self.low == self.low else "")


def paired(
    scores: pd.DataFrame, reference: pd.DataFrame, clusters: Mapping[str, str] | None = None
) -> Difference | None:
    """``scores`` less ``reference``, both seeds × subjects, on the seeds and subjects that both have.

    Args:
        scores: of one row.
        reference: of the other row.
        clusters: subject → cluster; a subject that is not named is a cluster of its own.

    Returns:
        The difference; ``None`` if no seed and subject has both.
    """
    common = scores.sub(reference).dropna(axis=0, how="all").dropna(axis=1)
    if common.empty:
        return None
    subjects = common.shape[1]
    names = [(clusters or {}).get(str(subject), subject) for subject in common.columns]
    values = common.T.groupby(np.array(names, dtype=object)).mean().T.to_numpy(float)
    low, high, p = two_way(values)
    return Difference(float(values.mean()), float(low), float(high), float(p), len(values), subjects, values.shape[1])


def two_way(difference: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Interval of the mean, and the two-sided p value of a mean of 0.

    Args:
        difference: ``(…, S, N)`` differences of S seeds and N clusters, without gaps.
        level: coverage that is aimed at.

    Returns:
        Three arrays ``(…)``: lower end, upper end, p; NaN with one seed or one cluster.
    """
    from scipy.special import stdtr, stdtrit

    seeds, clusters = difference.shape[-2:]
    mean = difference.mean((-2, -1))
    if min(seeds, clusters) < 2:
        unknown = np.full_like(mean, np.nan, dtype=float)
        return unknown, unknown.copy(), unknown.copy()
    by_seed = difference.mean(-1, keepdims=True) - mean[..., None, None]
    by_cluster = difference.mean(-2, keepdims=True) - mean[..., None, None]
    rest = difference - mean[..., None, None] - by_seed - by_cluster
    freedom = np.array([seeds - 1, clusters - 1, (seeds - 1) * (clusters - 1)])
    sums = [clusters * (by_seed**2).sum((-2, -1)), seeds * (by_cluster**2).sum((-2, -1)), (rest**2).sum((-2, -1))]
    squares = np.stack(sums, -1) / freedom  # (…, 3) mean squares of seeds, clusters, residual
    total = np.maximum(squares @ np.array([1.0, 1.0, -1.0]), squares[..., :2].max(-1))
    tiny = np.finfo(float).tiny
    degrees = np.maximum(total**2 / np.maximum((squares**2 / freedom).sum(-1), tiny), min(seeds, clusters) - 1)
    error = np.sqrt(total / (seeds * clusters))
    half = stdtrit(degrees, (1 + level) / 2) * error
    p = np.where(mean == 0, 1.0, 2 * stdtr(degrees, -np.abs(mean) / np.maximum(error, tiny)))
    return mean - half, mean + half, p


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p values of a family of tests (Holm 1979): those below α are wrong together with a chance below α.

    Args:
        p: of each test; NaN means no test and stays NaN.
    """
    values = np.asarray(p, dtype=float)
    adjusted = np.full(len(values), np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * values[order])) if len(order) else []
    return adjusted.tolist()
