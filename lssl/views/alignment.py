"""Two views aligned in both directions, voxel by voxel: matrices by the host, lattices by the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lssl.networks.feature_geometry import Tap
from lssl.utils.transfer import send
from lssl.views import affines as algebra
from lssl.views import geometry as geo
from lssl.views.points import feature_affines
from lssl.views.view import Placement, View

__all__ = ["AlignedLattices", "align_views", "bring", "lattice_parts", "lattice_sum"]

SLACK = 1e-9  # voxels, see :func:`lssl.views.affines.contains`


@dataclass
class AlignedLattices:
    """Lattices of T taps in both views, and where the other view shows them; direction 0 is 1 → 2, direction 1 back.

    The N features of all taps follow one another.

    Attributes:
        grids: for each tap the parts of the sampling grids at which the other view's map is read, ``(2 B, n, 3)``
            float32 each.
        positions: the same of the features' positions in mm, float64.
        valid: ``(2, B, N)`` bool, features that both views show.
        shifts: for each tap ``(2 B, D, H, W, 3)`` float32, added to the grids where tissue moves.
    """

    grids: list[list[Tensor]]
    positions: list[list[Tensor]]
    valid: Tensor
    shifts: list[Tensor | None]

    @property
    def counts(self) -> list[int]:
        """Numbers of features of the taps, whose sum is N."""
        return [math.prod(part.shape[1] for part in grid) for grid in self.grids]

    def of_other(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps ``(2 B, C, ...)`` of each tap in both views, brought onto the other's lattice: ``(2, B, N, C)``."""
        moved = []
        for both, grid, shift in zip(maps, self.grids, self.shifts, strict=True):
            other = torch.cat(both.chunk(2)[::-1])
            moved.append(geo.resample_parts(other, grid, padding="border", shift=shift).flatten(2))
        return torch.cat(moved, 2).transpose(1, 2).unflatten(0, (2, -1))

    @property
    def points_mm(self) -> Tensor:
        """``(2, B, N, 3)`` float64 positions of the features."""
        return torch.cat([lattice_sum(parts) for parts in self.positions], 1).unflatten(0, (2, -1))


def align_views(
    first: View,
    second: View,
    taps: Sequence[Tap],
    sizes: Sequence[Sequence[int]],
    margin: float = 0.0,
    foreground: bool = False,
) -> AlignedLattices:
    """Plans the alignment of taps' maps in both directions, and finds what both views show.

    Args:
        first: B views.
        second: B views of the same subjects.
        taps: where the features lie.
        sizes: of the taps' maps.
        margin: features to keep away from the border of both lattices.
        foreground: only features on the foreground of both views.
    """
    views, moves = (first.host, second.host), first.motion is not None
    plans = []
    for tap, size in zip(taps, sizes, strict=True):
        plan = plan_alignment(views, tap, size, margin)
        plans.append(plan + plan_motion(views, tap, size, margin) if moves else plan)
    low, high = _bounds(views)
    sent = send([low, high, *(array for plan in plans for array in plan)], first.image.device)
    parts = [sent[n : n + len(plans[0])] for n in range(2, len(sent), len(plans[0]))]
    placed = [_placed(first, second, part, size) for part, size in zip(parts, sizes, strict=True)]
    index = torch.cat([each for each, _ in placed], 1)
    valid = ((index >= sent[0]) & (index <= sent[1][:, None])).all(-1).unflatten(0, (2, -1))
    if foreground:
        valid = valid & _on_foreground(first, second, index[..., 6:])
    shifts = [shift for _, shift in placed]
    return AlignedLattices([part[:3] for part in parts], [part[3:6] for part in parts], valid, shifts)


def _placed(first: View, second: View, parts: Sequence[Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """The twelve indices ``(2 B, N, 12)`` of a tap's features, and the shift of its grids, if tissue moves."""
    index = lattice_sum(parts[6:9])
    if not parts[9:]:
        return index, None
    points = lattice_sum(parts[3:6]).unflatten(0, (2, -1))
    motion = torch.cat([first.follow(points[0]) - points[0], second.follow(points[1]) - points[1]])
    pull, of_grid = parts[9:]
    return index + motion @ pull.mT, (motion @ of_grid.mT).float().unflatten(1, tuple(size))


def _on_foreground(first: View, second: View, index: Tensor) -> Tensor:
    """``(2, B, N)`` bool, true at indices ``(2 B, N, 6)`` that both sources have as foreground; outside, either."""
    masks = torch.stack([first.source_foreground, second.source_foreground])
    height, width = masks.shape[3:]
    i, j, k = index.unflatten(2, (2, 3)).round().permute(2, 3, 0, 1).unbind(1)  # (2, 2 B, N)
    flat = torch.add(torch.add(k, j, alpha=width), i, alpha=height * width)
    flat = flat.clamp(0, masks[0, 0].numel() - 1).long().unflatten(1, (2, -1))
    return masks.flatten(2)[:, None].expand(-1, 2, -1, -1).gather(3, flat).all(0)


def bring(maps: Tensor, source: View, view: View) -> tuple[Tensor, Tensor]:
    """Maps ``(B, C, ...)`` of one view's voxels, on the voxels of another; see :func:`lssl.views.geometry.align`.

    Where tissue moves, a voxel of ``view`` takes what ``source`` shows of its tissue.
    """
    if view.motion is None:
        return geo.align(maps, source.affine, view.affine, view.size)
    points = geo.transform(view.affine, geo.lattice(view.size, view.affine.device))
    there = view.follow(points)
    valid = geo.contains(geo.transform(geo.inverse(source.affine), there), maps.shape[-3:])
    brought = geo.sample(maps, source.affine, there).transpose(1, 2)
    return brought.unflatten(2, view.size), valid.unflatten(1, view.size)


def plan_alignment(
    views: tuple[Placement, Placement], tap: Tap, size: Sequence[int], margin: float
) -> list[np.ndarray]:
    """Three parts of grids, of positions, and of twelve indices per feature, whose bounds :func:`_bounds` gives.

    The twelve are the feature's own index and its index in the other view, scaled so that those that count lie within
    [0, 1], and those in the sources of both views.
    """
    lattices, others = _lattices(views, tap)
    there = algebra.inverse(others) @ lattices
    sources = [algebra.inverse(np.concatenate([view.source_affine] * 2)) @ lattices for view in views]
    low, reach = _within(views, tap, size, margin)
    scaled = np.stack([np.broadcast_to(np.eye(4), there.shape), there])[:, :, :3]
    scaled[..., 3] -= low
    scaled /= reach[:, None]
    rows = np.concatenate([*scaled, *(matrix[:, :3] for matrix in sources)], 1)  # (2 B, 12, 4)
    grid = [part.astype(np.float32) for part in geo.grid_parts(there, size, size)]
    return [*grid, *lattice_parts(lattices[:, :3], size), *lattice_parts(rows, size)]


def _within(
    views: tuple[Placement, Placement], tap: Tap, size: Sequence[int], margin: float
) -> tuple[np.ndarray, np.ndarray]:
    """The least index ``(3,)`` of features that count, and how far the greatest lies from it; both with some slack."""
    stride, offset, sides = np.array(tap.stride, float), np.array(tap.offset), np.asarray(size)
    edge = np.asarray(views[0].size) - 0.5  # a feature's centre must lie within the view, too
    low = np.maximum(margin, (-0.5 - offset) / stride) - SLACK
    high = np.minimum(sides - 1 - margin, (edge - offset) / stride) + SLACK
    return low, np.maximum(high - low, SLACK)


def _bounds(views: tuple[Placement, Placement]) -> tuple[np.ndarray, np.ndarray]:
    """Least ``(12,)`` and greatest ``(2 B, 12)`` of a feature's twelve indices if both views show it."""
    last = [np.concatenate([view.source_extent - 1.0] * 2) + SLACK for view in views]
    return np.repeat([0.0, -SLACK], 6), np.concatenate([np.ones((len(last[0]), 6)), *last], 1)


def plan_motion(views: tuple[Placement, Placement], tap: Tap, size: Sequence[int], margin: float) -> list[np.ndarray]:
    """What a millimetre of motion changes of the twelve indices ``(2 B, 12, 3)``, and of the grids ``(2 B, 3, 3)``."""
    lattices, others = _lattices(views, tap)
    back, half = algebra.inverse(others)[:, :3, :3], len(lattices) // 2
    pull = np.zeros((2 * half, 12, 3))
    pull[:, 3:6] = back / _within(views, tap, size, margin)[1][:, None]
    pull[:half, 9:] = algebra.inverse(views[1].source_affine)[:, :3, :3]  # the other visit's source
    pull[half:, 6:9] = algebra.inverse(views[0].source_affine)[:, :3, :3]
    return [pull, (geo.normalise(size)[:3, :3] @ back)[:, ::-1].copy()]  # torch wants (x, y, z) = (W, H, D)


def _lattices(views: tuple[Placement, Placement], tap: Tap) -> tuple[np.ndarray, np.ndarray]:
    """Feature index → frame ``(2 B, 4, 4)`` of both views, and of the other view each."""
    lattices = np.concatenate([feature_affines(view.affine, [tap])[0] for view in views])
    return lattices, np.roll(lattices, len(lattices) // 2, 0)


def lattice_parts(rows: np.ndarray, size: Sequence[int]) -> list[np.ndarray]:
    """``rows (N, R, 4)`` of every index of a lattice, as three parts ``(N, n, R)`` whose sum it is."""
    parts = [rows[:, None, :, axis] * np.arange(n, dtype=float)[:, None] for axis, n in enumerate(size)]
    parts[0] = parts[0] + rows[:, None, :, 3]
    return parts


def lattice_sum(parts: Sequence[Tensor]) -> Tensor:
    """``(N, d h w, R)`` of every index of a lattice, of its parts (:func:`lattice_parts`)."""
    d, h, w = parts
    return (d[:, :, None, None] + h[:, None, :, None] + w[:, None, None]).flatten(1, 3)
