"""Corresponding points of two views: features of a tap at the same point of the frame.

Points are chosen on the host, by index, for all taps at once (:func:`plan_points`); the device only interpolates
features at them (:func:`at_grid`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lssl.networks.feature_geometry import Tap
from lssl.utils.random import host_generator
from lssl.utils.transfer import send
from lssl.views import affines as algebra
from lssl.views import geometry as geo
from lssl.views.view import Placement, View, nearest

__all__ = [
    "Points",
    "at_grid",
    "at_points",
    "corresponding_points",
    "draw",
    "draw_distinct",
    "feature_affines",
    "first_true",
    "plan_points",
    "sampling_grids",
]

FIRST, MOST = 3, 8  # candidates per wanted point: looked at first, and at most


@dataclass
class Points:
    """Corresponding points of B pairs of views at T taps, on the host.

    Attributes:
        mm: ``(T, B, K, 3)`` positions in the frame.
        weight: ``(T, B)`` float32: 1, or 0 for a sample without such points (its points are then arbitrary).
        index: ``(T, B, K)`` of the features in view 1's lattices, last axis fastest.
    """

    mm: np.ndarray
    weight: np.ndarray
    index: np.ndarray


def plan_points(
    first: Placement,
    second: Placement,
    taps: Sequence[Tap],
    count: int,
    draws: np.random.Generator,
    foreground: bool = False,
) -> Points:
    """Draws features of view 1's lattices that view 2 shows too, uniformly and without replacement.

    Candidates of a lattice of N features come from strata of it: with n strata of ⌊N/n⌋ or ⌈N/n⌉ features, shifted
    by a random number of features around the lattice, every feature is as likely, and none is drawn twice.

    Args:
        first: B views, whose lattices the points lie on.
        second: B views whose features are interpolated there.
        taps: where the features lie.
        count: points per sample and tap; at most as many as the largest lattice has. A sample with fewer repeats them.
        draws: source of random numbers.
        foreground: only points on the foreground of both views, if there are any.
    """
    size = np.array([[n // s for n, s in zip(first.size, tap.stride, strict=True)] for tap in taps])  # (T, 3)
    number = size.prod(1)
    count = min(count, int(number.max()))
    index = draw_distinct(number, len(first.affine), MOST * count, draws)  # (T, B, N), -1 for none
    lattices = [feature_affines(view.affine, taps) for view in (first, second)]
    look = _Look((first, second), taps, size, *lattices)
    some = index[..., : FIRST * count]
    seen = look.seen(some, slice(None), foreground)
    lacking = (seen.sum(-1) < count).any(1) & (number > FIRST * count)
    chosen = np.take_along_axis(some, first_true(seen, count), -1)
    weight = seen.max(-1).astype(np.float32)
    if lacking.any():
        seen = look.seen(index[lacking], lacking, foreground)
        chosen[lacking] = np.take_along_axis(index[lacking], first_true(seen, count), -1)
        weight[lacking] = seen.max(-1)
    chosen = chosen.clip(0)
    return Points(algebra.transform(lattices[0], look.unravel(chosen, slice(None))), weight, chosen)


def draw_distinct(number: np.ndarray, samples: int, most: int, draws: np.random.Generator) -> np.ndarray:
    """Distinct indices ``(T, samples, N)`` of lattices of ``number (T,)`` features, in random order; -1 for none."""
    index = np.full((len(number), samples, min(most, int(number.max()))), -1)
    for row, n in zip(index, number.tolist(), strict=True):
        strata = min(most, n)
        stratum = draws.permutation(strata)
        start = stratum * n // strata
        width = (stratum + 1) * n // strata - start
        within = (draws.random((samples, strata)) * width).astype(np.int64)
        row[:, :strata] = (start + within + draws.integers(n, size=(samples, 1))) % n
    return index


class _Look:
    """Which features of view 1's lattices both views show."""

    def __init__(
        self,
        views: tuple[Placement, Placement],
        taps: Sequence[Tap],
        size: np.ndarray,
        own: np.ndarray,
        other: np.ndarray,
    ) -> None:
        first, second = views
        self.size, self.views = size, views
        stride, offset = (np.array([getattr(tap, name) for tap in taps], float) for name in ("stride", "offset"))
        # Feature index of view 1 → of view 2, and → indices of both sources: nine rows
        sources = [algebra.inverse(view.source_affine) @ own for view in (first, second)]
        self.rows = np.concatenate([part[..., :3, :] for part in (algebra.inverse(other) @ own, *sources)], -2)
        # A feature that lies within its lattice, and its centre within the view
        low = np.maximum(0, (-0.5 - offset) / stride)
        high = np.minimum(size - 1, (np.asarray(first.size) - 0.5 - offset) / stride)
        self.own = low, high
        samples = len(first.affine)
        zero, last = np.zeros((len(size), samples, 3)), [view.source_extent - 1.0 for view in (first, second)]
        self.low = np.concatenate([zero + low[:, None], zero, zero], -1) - 1e-9
        self.high = np.concatenate([zero + high[:, None], *(zero + value for value in last)], -1) + 1e-9

    def unravel(self, index: np.ndarray, taps: slice | np.ndarray) -> np.ndarray:
        """Flat indices ``(T, B, N)`` of lattices as ``(T, B, N, 3)`` float64."""
        _, height, width = self.size[taps].T[:, :, None, None]
        rest, k = np.divmod(index, width)
        i, j = np.divmod(rest, height)
        return np.stack([i, j, k], -1).astype(np.float64)

    def seen(self, index: np.ndarray, taps: slice | np.ndarray, foreground: bool) -> np.ndarray:
        """Bool ``(T, B, N)``; with ``foreground``, those on it, for samples that have any."""
        own, rows = self.unravel(index, taps), self.rows[taps]
        places = rows[..., :3] @ own.swapaxes(-1, -2) + rows[..., 3:]  # (T, B, 9, N)
        seen = ((places >= self.low[taps][..., None]) & (places <= self.high[taps][..., None])).all(-2)
        seen &= index >= 0
        low, high = (bound[taps][:, None, None] for bound in self.own)
        if (low > 0).any() or (high < self.size[taps][:, None, None] - 1).any():
            seen &= ((own >= low - 1e-9) & (own <= high + 1e-9)).all(-1)
        if foreground:
            inside = seen.copy()
            for view, start in zip(self.views, (3, 6), strict=True):
                voxels = places[..., start : start + 3, :].swapaxes(-1, -2)  # (T, B, N, 3)
                flat = voxels.swapaxes(0, 1).reshape(voxels.shape[1], -1, 3)
                hit = nearest(view.source_foreground, flat).reshape(len(flat), len(voxels), -1)
                inside &= hit.swapaxes(0, 1)
            seen = np.where(inside.any(-1, keepdims=True), inside, seen)
        return seen


def corresponding_points(
    first: View, second: View, tap: Tap, count: int, generator: torch.Generator, foreground: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`plan_points` of one tap, as tensors on the views' device.

    Returns:
        ``(B, K, 3)`` points in mm, and ``(B,)`` float weights.
    """
    points = plan_points(first.host, second.host, [tap], count, host_generator(generator), foreground)
    points_mm, weight = send([points.mm[0], points.weight[0]], first.affine.device)
    return points_mm, weight


def feature_affines(affine: np.ndarray, taps: Sequence[Tap]) -> np.ndarray:
    """``G (T, B, 4, 4)``: feature index → frame, of B views ``(B, 4, 4)`` at T taps."""
    return np.stack([algebra.feature_affine(affine, tap.stride, tap.offset) for tap in taps])


def draw(valid: Tensor, count: int) -> Tensor:
    """The first ``count`` true columns of each row of ``(B, N)`` as indices ``(B, K)``, ``K = min(count, N)``.

    A row with fewer true columns repeats them; a row with none gets arbitrary indices.
    """
    order = valid.int().argsort(dim=1, descending=True, stable=True)
    found = valid.sum(1, keepdim=True).clamp_min(1)
    return order.gather(1, torch.arange(min(count, valid.shape[1]), device=order.device) % found)


def first_true(valid: np.ndarray, count: int) -> np.ndarray:
    """:func:`draw` of arrays ``(..., N)``; always ``count`` indices, repeated if there are fewer columns."""
    order = (~valid).argsort(-1, kind="stable")
    found = valid.sum(-1, keepdims=True).clip(1)
    return np.take_along_axis(order, np.arange(count) % found, -1)


def sampling_grids(views: Sequence[Placement], taps: Sequence[Tap], points_mm: np.ndarray) -> np.ndarray:
    """Where :func:`at_grid` samples the maps of T taps in V views, for points ``(T, B, K, 3)`` of the frame.

    Returns:
        ``(T, V, B, K, 3)`` float32, torch's normalised coordinates.
    """
    grids = []
    for view in views:
        sides = [[n // s for n, s in zip(view.size, tap.stride, strict=True)] for tap in taps]
        normalise = np.stack([geo.normalise(side) for side in sides])[:, None]
        matrix = normalise @ algebra.inverse(feature_affines(view.affine, taps))
        grids.append(algebra.transform(matrix, points_mm)[..., ::-1])
    return np.stack(grids, 1).astype(np.float32)


def at_grid(features: Tensor, grid: Tensor) -> Tensor:
    """Features ``(N, C, ...)`` at ``grid (N, K, 3)`` of :func:`sampling_grids`, as ``(N, K, C)`` float32."""
    return geo.sample_grid(features, grid[:, :, None, None], "bilinear", "border").flatten(2).transpose(1, 2)


def at_points(features: Tensor, view: View, tap: Tap, points: Tensor) -> Tensor:
    """Features ``(B, C, ...)`` of a tap at points ``(B, K, 3)`` of the frame, as ``(B, K, C)`` float32."""
    return geo.sample(features, geo.feature_affine(view.affine, tap.stride, tap.offset), points)
