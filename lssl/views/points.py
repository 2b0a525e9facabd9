"""Corresponding points of two views: features of a tap at the same point of the frame.

Points are chosen on the host, by index, for all taps at once (:func:`plan_points`); the device only interpolates
features at them (:func:`at_grid`).

Every array of random numbers has the pair as its first axis: a pair's points are its own, and they are the same whether
one process plans the batch or several share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType

import numpy as np
import torch
from torch import Tensor

from lssl.networks.feature_geometry import Tap
from lssl.utils.random import host_generator
from lssl.utils.transfer import send
from lssl.views import affines as algebra
from lssl.views import geometry as geo
from lssl.views.draws import Candidates, first_of
from lssl.views.view import Placement, View

__all__ = [
    "Points",
    "at_grid",
    "at_points",
    "corresponding_points",
    "feature_affines",
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
        places: ``(T, V, B, K, 3)`` where each view shows the points: V is 1 if the frame tells, or 2.

    Planned both ways, T is the number of taps twice: those of view 1's lattices, then those of view 2's.
    """

    mm: np.ndarray
    weight: np.ndarray
    index: np.ndarray
    places: np.ndarray


def plan_points(
    first: Placement,
    second: Placement,
    taps: Sequence[Tap],
    count: int,
    draws: np.random.Generator,
    foreground: bool = False,
    both_ways: bool = False,
) -> Points:
    """Draws features of view 1's lattices that view 2 shows too, uniformly and without replacement.

    Candidates of a lattice of N features come from strata of it: with n strata of ⌊N/n⌋ or ⌈N/n⌉ features, shifted
    by a random number of features around the lattice, every feature is as likely, and none is drawn twice.

    Args:
        first: B views, whose lattices the points lie on.
        second: B views, as large, whose features are interpolated there.
        taps: where the features lie.
        count: points per sample and tap; at most as many as the largest lattice has. A sample with fewer repeats them.
        draws: source of random numbers.
        foreground: only points on the foreground of both views, if there are any.
        both_ways: also points of view 2's lattices that view 1 shows, from the same candidates.
    """
    look = _Look(first, second, taps, foreground, both_ways)
    number = look.size.prod(-1)
    count = min(count, int(number.max()))
    candidates = Candidates(number[: len(taps)], len(first.affine), MOST * count, draws)
    ways = 1 + both_ways
    chosen, weight, enough = look.choose(np.tile(candidates.index(FIRST * count), (ways, 1, 1)), count)
    lacking = ~enough & (number > FIRST * count)[:, None]
    if lacking.any():
        more = np.tile(candidates.index(MOST * count), (ways, 1, 1))[lacking]
        chosen[lacking], weight[lacking], _ = look.choose(more, count, lacking)
    points_mm, places = look.places(chosen)
    return Points(points_mm, weight.astype(np.float32), chosen.astype(np.int64), places)


class _Look:
    """Which features of a view's lattices both views show, ways and taps along the first axis.

    Of a feature, nine numbers tell: its voxel in the other view and its voxels in both sources, an affine map of its
    index. They are scaled so that what is shown lies within [-1, 1]. If tissue moves, those of the other view and its
    source are of where the feature's tissue lies there.
    """

    def __init__(
        self, first: Placement, second: Placement, taps: Sequence[Tap], foreground: bool, both_ways: bool
    ) -> None:
        ways, (stride, offset) = 1 + both_ways, _strides(taps)
        self.views, self.foreground, self.taps = (first, second), foreground, len(stride)
        sides = np.asarray(first.size)
        size = sides // stride
        # Feature centres must lie within the view, too; in its voxels
        whole = offset + stride * (size - 1)
        low, high = np.maximum(offset, -0.5), np.minimum(whole, sides - 0.5)
        self.limited = bool((low > offset).any() or (high < whole).any())
        own = np.array([first.affine, second.affine])
        back = algebra.inverse(np.array([second.affine, first.affine, first.source_affine, second.source_affine]))
        own, there = own[:ways], (back[:ways], back[2], back[3])
        rows = np.concatenate([(matrix @ own)[..., :3, :] for matrix in there], -2)[:, None]  # (ways, 1, B, 9, 4)
        rows = self._of_features(rows, stride, offset)  # (ways, T, B, 9, 4)
        bounds = np.zeros((2, *rows.shape[:-1]))
        bounds[0, ..., :3], bounds[1, ..., :3] = low[:, None], high[:, None]
        bounds[1, ..., 3:6], bounds[1, ..., 6:] = first.source_extent - 1.0, second.source_extent - 1.0
        self.voxels = _flat(rows[..., 3:, :])
        self.scaled = _flat(rows.copy())
        middle = _flat(bounds[0] + bounds[1]) / 2
        self.scaled[..., 3] -= middle
        reach = np.maximum(_flat(bounds[1]) - middle, 0)[..., None] + 1e-9
        self.scaled /= reach
        self.pull = self._of_motion(there) if first.motion is not None else None
        self.scaled_pull = None if self.pull is None else self.pull / reach
        self.size = np.concatenate([size] * ways)
        self.bounds = [np.concatenate([(edge - offset) / stride] * ways) for edge in (low - 1e-9, high + 1e-9)]
        self.lattices = _flat(self._of_features(own[:, None], stride, offset))

    @staticmethod
    def _of_features(rows: np.ndarray, stride: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Maps ``(..., 1, B, R, 4)`` of voxels of a view as maps ``(..., T, B, R, 4)`` of features of T taps."""
        found = rows * np.concatenate([stride, np.ones((len(stride), 1))], 1)[:, None, None]
        found[..., 3] += (rows[..., :3] * offset[:, None, None]).sum(-1)
        return found

    def choose(
        self, index: np.ndarray, count: int, rows: np.ndarray | EllipsisType = ...
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first ``count`` of candidates that are seen, whether there are any, and whether there are enough.

        Args:
            index: ``(..., N)`` of features, float64.
            count: K.
            rows: which ways, taps and samples they are of, if not of all: ``(ways T, B)`` bool.

        Returns:
            ``(..., K)``, and bool ``(...)`` twice.
        """
        own = self._unravel(index, rows)
        places = self.scaled[rows] @ own  # (..., 9, N)
        shift = None if self.scaled_pull is None else self._shift(own, rows)
        if self.scaled_pull is not None and shift is not None:
            places += self.scaled_pull[rows] @ shift
        seen = (np.abs(places, out=places) <= 1).all(-2) & (index >= 0)
        if self.limited:
            low, high = (self._of(bound, rows)[..., None] for bound in self.bounds)
            seen &= ((own[..., :3, :] >= low) & (own[..., :3, :] <= high)).all(-2)
        wanted = self._on_foreground(own, seen, rows, shift) if self.foreground else seen
        place, found = first_of(wanted, count)
        enough = found >= count
        if self.foreground and not found.all():
            place, found = first_of(np.where(found[..., None] > 0, wanted, seen), count)
        return index.reshape(-1)[place].clip(0), found > 0, enough

    def places(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions ``(ways T, B, K, 3)`` of features ``(ways T, B, K)``, and where each view shows them."""
        own = self._unravel(index, ...)
        points_mm = (self.lattices[..., :3, :] @ own).swapaxes(-1, -2)
        if self.pull is None:
            return points_mm, points_mm[:, None]
        there = points_mm + self._shift(own, ...).swapaxes(-1, -2)
        places = np.stack([points_mm, there], 1)
        places[self.taps :] = places[self.taps :, ::-1].copy()  # the way back, if it is planned
        return points_mm, places

    def _of_motion(self, there: Sequence[np.ndarray]) -> np.ndarray:
        """What a millimetre of motion changes of the nine numbers, ``(ways T, B, 9, 3)``."""
        pull = np.zeros((len(there[0]), self.taps, *there[1].shape[:1], 9, 3))
        for way, other in enumerate(there[0]):
            pull[way, ..., :3, :] = other[:, :3, :3]
            source = 2 - way  # the other view's
            pull[way, ..., 3 * source : 3 * source + 3, :] = there[source][:, :3, :3]
        return _flat(pull)

    def _shift(self, own: np.ndarray, rows: np.ndarray | EllipsisType) -> np.ndarray:
        """Motion ``(..., 3, N)`` in mm of the tissue of features ``(..., 4, N)``."""
        points = (self.lattices[rows][..., :3, :] @ own).swapaxes(-1, -2)
        flat, found = points.reshape(-1, *points.shape[-2:]), np.empty(points.shape)
        ways = np.broadcast_to(np.arange(len(self.lattices))[:, None] // self.taps, self.lattices.shape[:2])[rows]
        samples = np.broadcast_to(np.arange(self.lattices.shape[1]), self.lattices.shape[:2])[rows]
        for way, view in enumerate(self.views):
            of_way = np.flatnonzero(ways.reshape(-1) == way)
            if len(of_way):
                moved = view.follow(flat[of_way], samples.reshape(-1)[of_way])
                found.reshape(flat.shape)[of_way] = moved - flat[of_way]
        return found.swapaxes(-1, -2)

    def _of(self, values: np.ndarray, rows: np.ndarray | EllipsisType) -> np.ndarray:
        """Values ``(ways T, 3)`` of taps, for rows of ways, taps and samples."""
        return np.broadcast_to(values[:, None], (len(values), self.scaled.shape[1], 3))[rows]

    def _unravel(self, index: np.ndarray, rows: np.ndarray | EllipsisType) -> np.ndarray:
        """Flat indices ``(..., N)`` of lattices as ``(..., 4, N)``, the last being 1."""
        height, width = np.moveaxis(self._of(self.size, rows), -1, 0)[1:, ..., None].astype(np.float64)
        found = np.empty((4, *index.shape))
        rest = np.floor(index / width)
        np.subtract(index, rest * width, out=found[2])
        np.floor(rest / height, out=found[0])
        np.subtract(rest, found[0] * height, out=found[1])
        found[3] = 1
        return np.moveaxis(found, 0, -2)

    def _on_foreground(
        self, own: np.ndarray, seen: np.ndarray, rows: np.ndarray | EllipsisType, shift: np.ndarray | None
    ) -> np.ndarray:
        """Which of the seen features ``(..., 4, N)`` are foreground of both sources."""
        voxels = self.voxels[rows] @ own  # (..., 6, N)
        if self.pull is not None and shift is not None:
            voxels += self.pull[rows][..., 3:, :] @ shift
        np.rint(voxels, out=voxels)
        left = np.flatnonzero(seen)
        pairs = np.broadcast_to(np.arange(self.scaled.shape[1]), self.scaled.shape[:2])[rows].reshape(-1)
        for view, at in zip(self.views, (0, 3), strict=True):
            samples, _, height, width = view.source_foreground.shape
            i, j, k = voxels[..., at, :], voxels[..., at + 1, :], voxels[..., at + 2, :]
            masks = view.source_foreground.reshape(samples, -1)  # no copy, though samples are apart in memory
            flat = ((i * height + j) * width + k).reshape(-1)[left].astype(np.int64)
            left = left[masks[pairs[left // seen.shape[-1]], flat]]
        found = np.zeros(seen.size, dtype=bool)
        found[left] = True
        return found.reshape(seen.shape)


def _strides(taps: Sequence[Tap]) -> tuple[np.ndarray, np.ndarray]:
    """Strides, int64, and centre offsets, float64, of taps, ``(T, 3)``."""
    return np.array([tap.stride for tap in taps]), np.array([tap.offset for tap in taps], dtype=np.float64)


def _flat(values: np.ndarray) -> np.ndarray:
    """Ways and taps as one axis."""
    return values.reshape(-1, *values.shape[2:])


def corresponding_points(
    first: View, second: View, tap: Tap, count: int, generator: torch.Generator, foreground: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`plan_points` of one tap, as tensors on the views' device.

    Returns:
        ``(B, K, 3)`` points in mm, which :meth:`View.follow` of ``first`` brings to ``second``, and ``(B,)`` float
        weights.
    """
    points = plan_points(first.host, second.host, [tap], count, host_generator(generator), foreground)
    points_mm, weight = send([points.mm[0], points.weight[0]], first.affine.device)
    return points_mm, weight


def feature_affines(affine: np.ndarray, taps: Sequence[Tap]) -> np.ndarray:
    """``G (T, ..., 4, 4)``: feature index → frame, of views ``(..., 4, 4)`` at T taps.

    See :func:`lssl.views.affines.feature_affine`.
    """
    stride, offset = (values.reshape(-1, *(1,) * (affine.ndim - 1), 3) for values in _strides(taps))
    linear = affine[..., :3, :3]
    return algebra.homogeneous(linear * stride, (linear * offset).sum(-1) + affine[..., :3, 3])


def sampling_grids(views: Sequence[Placement], taps: Sequence[Tap], places: np.ndarray) -> np.ndarray:
    """Where :func:`at_grid` samples the maps of T taps in V views, for points ``(T, V or 1, B, K, 3)`` of the frame.

    Returns:
        ``(T, V, B, K, 3)`` float32, torch's normalised coordinates.
    """
    stride, offset = (values[:, None, None] for values in _strides(taps))
    sides = np.array([view.size for view in views])[:, None] // stride  # (T, V, 1, 3), the features along each axis
    rows = algebra.inverse(np.array([view.affine for view in views]))[..., :3, :]  # the voxel v of a point
    # The feature (v - δ) / s, and geometry.normalise of it
    scale, shift = 2 / (stride * sides), (1 - 2 * offset / stride) / sides - 1
    linear = (rows[..., :3] * scale[..., None])[..., [2, 1, 0], :]  # torch wants (x, y, z) = (W, H, D)
    place = (rows[..., 3] * scale + shift)[..., None, [2, 1, 0]]
    return (places @ linear.swapaxes(-1, -2) + place).astype(np.float32)


def at_grid(features: Tensor, grid: Tensor) -> Tensor:
    """Features ``(N, C, ...)`` at ``grid (N, K, 3)`` of :func:`sampling_grids`, as ``(N, K, C)`` float32."""
    return geo.sample_grid(features, grid[:, :, None, None], "bilinear", "border").flatten(2).transpose(1, 2)


def at_points(features: Tensor, view: View, tap: Tap, points: Tensor) -> Tensor:
    """Features ``(B, C, ...)`` of a tap at points ``(B, K, 3)`` of the frame, as ``(B, K, C)`` float32."""
    return geo.sample(features, geo.feature_affine(view.affine, tap.stride, tap.offset), points)
