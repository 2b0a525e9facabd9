"""Weights that make sites and intervals count the same."""

from __future__ import annotations

import numpy as np

__all__ = ["interval_class", "pair_weights"]

EDGES = (0.0, 0.25, 0.75, 1.5, 2.5, 4.0, 6.0)  # years: repeats, half-yearly, yearly, two-yearly … and longer
ROUNDS = 20


def interval_class(interval: np.ndarray) -> np.ndarray:
    """``(pairs,)`` class of each interval in years: 0 for the same visit, then by :data:`EDGES`, -1 if unknown."""
    return np.where(np.isnan(interval), -1, np.searchsorted(EDGES, interval, side="left"))


def pair_weights(
    subject: np.ndarray, every_pair: bool, site: np.ndarray | None, interval: np.ndarray | None
) -> np.ndarray:
    """``(pairs,)`` weights that add up to 1.

    They start equal over subjects (or over pairs) and are scaled until every site, and every class of interval, has
    the same share; with both, in turn, which settles where sites and intervals allow it (iterative proportional
    fitting).

    Args:
        subject: ``(pairs,)`` number of each pair's subject.
        every_pair: pairs weigh the same to begin with, instead of subjects.
        site: ``(pairs,)`` number of each pair's site.
        interval: ``(pairs,)`` years, NaN where unknown.
    """
    weights = np.ones(len(subject)) if every_pair else 1.0 / np.bincount(subject)[subject]
    classes = [group for group in (site, None if interval is None else interval_class(interval)) if group is not None]
    for _ in range(ROUNDS if len(classes) > 1 else 1):
        for group in classes:
            number = np.unique(group, return_inverse=True)[1]
            weights = weights / np.bincount(number, weights)[number]
    return weights / weights.sum()
