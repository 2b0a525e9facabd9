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
from lssl.views.view import Placement, View

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
    size = _lattices(first.size, taps)
    number = size.prod(1)
    count = min(count, int(number.max()))
    lattices = feature_affines(np.stack([first.affine, second.affine]), taps)  # (T, 2, B, 4, 4)
    look = _Look((first, second), taps, size, lattices)
    index = draw_distinct(number, len(first.affine), FIRST * count, draws)  # (T, B, N), -1 for none
    seen = look.seen(index, slice(None), foreground)
    chosen = np.take_along_axis(index, first_true(seen, count), -1)
    weight: np.ndarray = seen.max(-1).astype(np.float32)
    lacking = (seen.sum(-1) < count).any(1) & (number > FIRST * count)
    if lacking.any():
        index = draw_distinct(number[lacking], len(first.affine), MOST * count, draws)
        seen = look.seen(index, lacking, foreground)
        chosen[lacking] = np.take_along_axis(index, first_true(seen, count), -1)
        weight[lacking] = seen.max(-1)
    chosen = chosen.clip(0)
    own = look.unravel(chosen, slice(None)).swapaxes(-1, -2)
    return Points(algebra.transform(lattices[:, 0], own), weight, chosen)


def draw_distinct(number: np.ndarray, samples: int, most: int, draws: np.random.Generator) -> np.ndarray:
    """Distinct indices ``(T, samples, N)`` of lattices of ``number (T,)`` features, in random order; -1 for none."""
    strata = np.minimum(number, most)
    index = np.full((len(number), samples, int(strata.max())), -1)
    for many in np.unique(strata).tolist():
        alike = strata == many
        n = number[alike, None]
        stratum = draws.permuted(np.broadcast_to(np.arange(many), (len(n), many)), axis=1)
        start = stratum * n // many
        width = (stratum + 1) * n // many - start
        shift = (draws.random((len(n), samples, 1)) * n[:, None]).astype(np.int64)
        found = (draws.random((len(n), samples, many)) * width[:, None]).astype(np.int64)
        found += start[:, None] + shift
        found -= n[:, None] * (found >= n[:, None])
        index[alike, :, :many] = found
    return index


def _lattices(size: Sequence[int], taps: Sequence[Tap]) -> np.ndarray:
    """``(T, 3)`` features along each axis, of views of this size."""
    return np.asarray(size) // np.array([tap.stride for tap in taps])


class _Look:
    """Which features of view 1's lattices both views show.

    Of a feature, nine numbers tell: its index in view 2 and its indices in both sources. Each is scaled so that what is
    shown lies in [-1, 1].
    """

    def __init__(
        self, views: tuple[Placement, Placement], taps: Sequence[Tap], size: np.ndarray, lattices: np.ndarray
    ) -> None:
        first, self.size, self.views = views[0], size, views
        stride, offset = (np.array([getattr(tap, name) for tap in taps], float) for name in ("stride", "offset"))
        own, other = lattices[:, 0], lattices[:, 1]
        sources = np.stack([view.source_affine for view in views])[None]
        back = algebra.inverse(np.concatenate([other[:, None], np.broadcast_to(sources, lattices.shape)], 1))
        rows = (back @ own[:, None])[..., :3, :].swapaxes(1, 2).reshape(*own.shape[:2], 9, 4)
        # A feature that lies within its lattice, and its centre within the view
        low = np.maximum(0, (-0.5 - offset) / stride)
        high = np.minimum(size - 1, (np.asarray(first.size) - 0.5 - offset) / stride)
        self.own = (low - 1e-9, high + 1e-9) if (low > 0).any() or (high < size - 1).any() else None
        last = [np.broadcast_to(view.source_extent - 1.0, (*own.shape[:2], 3)) for view in views]
        lows = np.concatenate([np.broadcast_to(low[:, None], last[0].shape), np.zeros((*own.shape[:2], 6))], -1)
        highs = np.concatenate([np.broadcast_to(high[:, None], last[0].shape), *last], -1)
        self.middle, self.half = (lows + highs) / 2, np.maximum((highs - lows) / 2, 0) + 1e-9
        rows[..., 3] -= self.middle
        self.rows = rows / self.half[..., None]

    def unravel(self, index: np.ndarray, taps: slice | np.ndarray) -> np.ndarray:
        """Flat indices ``(T, B, N)`` of lattices as ``(T, B, 3, N)`` float64, in which such divisions are exact."""
        _, height, width = self.size[taps].T[:, :, None, None].astype(np.float64)
        flat, found = index.astype(np.float64), np.empty((*index.shape[:2], 3, index.shape[2]))
        rest = np.floor(flat / width)
        found[:, :, 0] = np.floor(rest / height)
        found[:, :, 1] = rest - height * found[:, :, 0]
        found[:, :, 2] = flat - width * rest
        return found

    def seen(self, index: np.ndarray, taps: slice | np.ndarray, foreground: bool) -> np.ndarray:
        """Bool ``(T, B, N)``; with ``foreground``, those on it, for samples that have any."""
        own, rows = self.unravel(index, taps), self.rows[taps]
        places = rows[..., :3] @ own + rows[..., 3:]  # (T, B, 9, N)
        seen = (abs(places) <= 1).all(-2) & (index >= 0)
        if self.own is not None:
            low, high = (bound[taps][:, None, :, None] for bound in self.own)
            seen &= ((own >= low) & (own <= high)).all(-2)
        if foreground:
            voxels = np.rint(places[:, :, 3:] * self.half[taps, :, 3:, None] + self.middle[taps, :, 3:, None])
            inside = seen & self._on_foreground(voxels, seen)
            seen = np.where(inside.any(-1, keepdims=True), inside, seen)
        return seen

    def _on_foreground(self, voxels: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Whether voxels ``(T, B, 6, N)`` of both sources are foreground; what is not ``seen`` means nothing."""
        found = seen
        for view, place in zip(self.views, (voxels[:, :, :3], voxels[:, :, 3:]), strict=True):
            samples, _, height, width = view.source_foreground.shape
            flat = (place[:, :, 0] * height + place[:, :, 1]) * width + place[:, :, 2]
            masks = view.source_foreground.reshape(samples, -1)  # a view, though visits are apart in memory
            found = found & masks[np.arange(samples)[:, None], np.where(seen, flat, 0).astype(np.int64)]
        return found


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
    """``G (T, ..., 4, 4)``: feature index → frame, of views ``(..., 4, 4)`` at T taps.

    See :func:`lssl.views.affines.feature_affine`.
    """
    stride, offset = (np.array([getattr(tap, name) for tap in taps], float) for name in ("stride", "offset"))
    ahead = (len(taps), *(1,) * (affine.ndim - 2))
    linear = affine[..., :3, :3]
    shift = (linear * offset.reshape(*ahead, 1, 3)).sum(-1)
    return algebra.homogeneous(linear * stride.reshape(*ahead, 1, 3), shift + affine[..., :3, 3])


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
    sides = np.stack([_lattices(view.size, taps) for view in views], 1)[:, :, None].astype(np.float64)  # (T, V, 1, 3)
    rows = algebra.inverse(feature_affines(np.stack([view.affine for view in views]), taps))[..., :3, :]
    rows *= (2 / sides)[..., None]  # see geometry.normalise
    rows[..., 3] += 1 / sides - 1
    rows = rows[..., ::-1, :]  # torch wants (x, y, z) = (W, H, D)
    return (points_mm[:, None] @ rows[..., :3].swapaxes(-1, -2) + rows[..., None, :, 3]).astype(np.float32)


def at_grid(features: Tensor, grid: Tensor) -> Tensor:
    """Features ``(N, C, ...)`` at ``grid (N, K, 3)`` of :func:`sampling_grids`, as ``(N, K, C)`` float32."""
    return geo.sample_grid(features, grid[:, :, None, None], "bilinear", "border").flatten(2).transpose(1, 2)


def at_points(features: Tensor, view: View, tap: Tap, points: Tensor) -> Tensor:
    """Features ``(B, C, ...)`` of a tap at points ``(B, K, 3)`` of the frame, as ``(B, K, C)`` float32."""
    return geo.sample(features, geo.feature_affine(view.affine, tap.stride, tap.offset), points)
