"""Weights of pairs that give every site and every class of interval the same share."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lssl.utils.errors import InputError

__all__ = ["balanced_weights", "interval_class", "pair_weights"]

EDGES = (0.0, 0.25, 0.75, 1.5, 2.5, 4.0, 6.0)  # years: repeats, half-yearly, yearly, two-yearly … and longer
ROUNDS = 20


def interval_class(interval: np.ndarray) -> np.ndarray:
    """``(pairs,)`` class of each interval in years: 0 for the same visit, then by :data:`EDGES`, -1 if unknown."""
    return np.where(np.isnan(interval), -1, np.searchsorted(EDGES, interval, side="left"))


def pair_weights(
    subject: np.ndarray, every_pair: bool, site: np.ndarray | None, interval: np.ndarray | None
) -> np.ndarray:
    """``(pairs,)`` weights that add up to 1.

    They start equal over subjects (or over pairs). They are then scaled until every site, or every class of interval,
    has the same share. With both, the two scalings alternate (iterative proportional fitting), which converges where
    sites and intervals allow it.

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


def balanced_weights(
    table: pd.DataFrame, subject: np.ndarray, pairs: np.ndarray, balance: str, every_pair: bool
) -> np.ndarray:
    """``(pairs,)`` weights by the sites and times of a visit table; see :func:`pair_weights`.

    Args:
        table: one row per visit, with ``time`` and, for sites, ``site``.
        subject: ``(visits,)`` number of each row's subject.
        pairs: ``(pairs, 2)`` rows of the table; the interval of a series is that from its first to its last visit.
        balance: ``site``, ``interval`` or ``both``.
        every_pair: pairs start with equal weight, instead of subjects.

    Raises:
        InputError: if sites are to be balanced and the table names none.
    """
    site = interval = None
    if balance in ("site", "both"):
        if "site" not in table or not table["site"].fillna("").astype(bool).any():
            raise InputError("balance asks for sites, but the visit table has no column site; add it or drop balance.")
        site = pd.factorize(table["site"].fillna(""))[0][pairs[:, 0]]
    if balance in ("interval", "both"):
        time = table["time"].to_numpy(float)
        interval = time[pairs[:, -1]] - time[pairs[:, 0]]
    return pair_weights(subject[pairs[:, 0]], every_pair, site, interval)
