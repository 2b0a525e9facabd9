"""Draws of distinct indices: of the features of lattices, and among those that are valid."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["Candidates", "draw", "draw_distinct", "first_of", "first_true"]


def draw_distinct(number: np.ndarray, samples: int, most: int, draws: np.random.Generator) -> np.ndarray:
    """Distinct indices ``(T, samples, N)`` of lattices of ``number (T,)`` features, in random order; -1 for none."""
    return Candidates(number, samples, most, draws).index(most).astype(np.int64)


class Candidates:
    """Distinct indices of lattices in random order, one from each of at most ``most`` strata.

    See :func:`lssl.views.points.plan_points`.

    A sample has an order of its strata and a place within each, for all lattices, and a shift around each lattice.
    Indices are float64, in which divisions of such numbers are fast, and exact once rounded down.
    """

    def __init__(self, number: np.ndarray, samples: int, most: int, draws: np.random.Generator) -> None:
        most = min(most, int(number.max()))
        self.strata = np.minimum(number, most)
        self.order = draws.random((samples, most)).argsort(-1)
        self.within = draws.random((samples, most))
        self.number = number[:, None, None].astype(np.float64)
        self.shift = np.floor(draws.random((samples, len(number))).T[..., None] * self.number)

    def index(self, columns: int) -> np.ndarray:
        """The first of them, ``(T, samples, columns)`` or fewer; -1 for none."""
        samples, most = self.order.shape
        columns = min(columns, most)
        stratum = np.empty((len(self.strata), samples, columns))
        stratum[:] = self.order[:, :columns]
        small = self.strata < most
        for many in set(self.strata[small].tolist()):
            alike = self.strata == many
            stratum[alike, :, :many] = self.order[self.order < many].reshape(samples, many)[:, :columns]
        strata = self.strata[:, None, None]
        ratio = self.number / strata
        stratum *= ratio  # where strata end, if rounded down: at a whole number, or at least 1 / strata away from any
        stratum += 0.5 / strata
        start = np.floor(stratum)
        stratum += ratio
        found = np.floor(stratum, out=stratum)
        found -= start
        found *= self.within[:, :columns]
        np.floor(found, out=found)
        found += start
        found += self.shift
        np.subtract(found, self.number, out=found, where=found >= self.number)
        for tap in np.flatnonzero(small):
            found[tap, :, self.strata[tap] :] = -1
        return found


def draw(valid: Tensor, count: int) -> Tensor:
    """The first ``count`` true columns of each row of ``(B, N)`` as indices ``(B, K)``, ``K = min(count, N)``.

    A row with fewer true columns repeats them; a row with none gets arbitrary indices.
    """
    order = valid.int().argsort(dim=1, descending=True, stable=True)
    found = valid.sum(1, keepdim=True).clamp_min(1)
    return order.gather(1, torch.arange(min(count, valid.shape[1]), device=order.device) % found)


def first_true(valid: np.ndarray, count: int) -> np.ndarray:
    """:func:`draw` of arrays ``(..., N)``; always ``count`` indices, repeated if there are fewer columns."""
    return first_of(valid, count)[0] % valid.shape[-1]


def first_of(valid: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """:func:`first_true` as indices ``(..., count)`` of all of ``valid``, and how many of each row are true."""
    rows = valid.reshape(-1, valid.shape[-1])
    place = np.flatnonzero(rows)
    start = np.searchsorted(place, np.arange(len(rows) + 1) * rows.shape[1])
    found = start[1:] - start[:-1]
    order = np.arange(count)
    if (found >= count).all():
        picked = place[start[:-1, None] + order]
    else:
        picked = np.append(place, 0).take(start[:-1, None] + order % found.clip(1)[:, None], mode="clip")
        empty = np.flatnonzero(found == 0)
        picked[empty] = empty[:, None] * rows.shape[1]
    return picked.reshape(*valid.shape[:-1], count), found.reshape(valid.shape[:-1])
