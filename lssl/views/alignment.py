"""Two views aligned in both directions, voxel by voxel: matrices by the host, lattices by the device."""

from __future__ import annotations

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

__all__ = ["AlignedLattice", "align_views", "bring", "lattice_parts"]

SLACK = 1e-9  # voxels, see :func:`lssl.views.affines.contains`


@dataclass
class AlignedLattice:
    """The lattices of a tap in both views, and where the other view shows them; direction 0 is 1 → 2, direction 1 back.

    Attributes:
        size: ``(D, H, W)`` of the lattice, N features.
        grid: parts of the sampling grids at which the other view's map is read, ``(2 B, n, 3)`` float32 each.
        position: the same of the features' positions in mm, float64.
        valid: ``(2, B, N)`` bool, features that both views show.
        shift: ``(2 B, D, H, W, 3)`` float32, added to the grids where tissue moves.
    """

    size: tuple[int, int, int]
    grid: list[Tensor]
    position: list[Tensor]
    valid: Tensor
    shift: Tensor | None = None

    def of_other(self, maps: Tensor) -> Tensor:
        """Maps ``(2 B, C, ...)`` of both views, each brought onto the other's lattice: ``(2, B, N, C)`` float32."""
        first, second = maps.chunk(2)
        moved = geo.resample_parts(torch.cat([second, first]), self.grid, padding="border", shift=self.shift)
        return moved.flatten(2).transpose(1, 2).unflatten(0, (2, -1))

    @property
    def points_mm(self) -> Tensor:
        """``(2, B, N, 3)`` float64 positions of the features."""
        return _sum(self.position).unflatten(0, (2, -1))


def align_views(
    first: View, second: View, tap: Tap, size: Sequence[int], margin: float = 0.0, foreground: bool = False
) -> AlignedLattice:
    """Plans the alignment of a tap's maps in both directions, and finds what both views show.

    Args:
        first: B views.
        second: B views of the same subjects.
        tap: where the features lie.
        size: of the tap's maps.
        margin: features to keep away from the border of both lattices.
        foreground: only features on the foreground of both views.
    """
    views = first.host, second.host
    grid, position, checked, low, high = plan_alignment(views, tap, size, margin)
    pull = [] if first.motion is None else plan_motion(views, tap, size)
    sent = send([*grid, *position, *checked, low, high, *pull], first.image.device)
    index, low_, high_ = _sum(sent[6:9]), *sent[9:11]  # (2 B, N, 12)
    shift = None
    if pull:
        points = _sum(sent[3:6]).unflatten(0, (2, -1))
        motion = torch.cat([first.follow(points[0]) - points[0], second.follow(points[1]) - points[1]])
        index, shift = index + motion @ sent[11].mT, (motion @ sent[12].mT).float().unflatten(1, tuple(size))
    valid = ((index >= low_[:, None]) & (index <= high_[:, None])).all(-1).unflatten(0, (2, -1))
    if foreground:
        nearest = index[..., 6:].round().clamp_min(0).long().unflatten(0, (2, -1))
        for number, view in enumerate((first, second)):
            valid = valid & _lookup(view.source_foreground, nearest[..., 3 * number : 3 * number + 3])
    d, h, w = size
    return AlignedLattice((d, h, w), sent[:3], sent[3:6], valid, shift)


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
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
    """Parts of grids, of positions and of twelve indices per feature, and the bounds of these for a valid feature.

    The twelve are the feature's own index, its index in the other view, and those in the sources of both views.
    """
    lattices, others = _lattices(views, tap)
    there = algebra.inverse(others) @ lattices
    sources = [algebra.inverse(np.concatenate([view.source_affine] * 2)) @ lattices for view in views]
    own = np.broadcast_to(np.eye(4), there.shape)
    rows = np.concatenate([matrix[:, :3] for matrix in (own, there, *sources)], 1)  # (2 B, 12, 4)

    stride, offset, sides = np.array(tap.stride, float), np.array(tap.offset), np.asarray(size)
    edge = np.asarray(views[0].size) - 0.5  # a feature's centre must lie within the view, too
    low = np.maximum(margin, (-0.5 - offset) / stride)
    high = np.minimum(sides - 1 - margin, (edge - offset) / stride)
    last = [np.concatenate([view.source_extent - 1.0] * 2) for view in views]
    each = np.zeros((len(lattices), 3))
    lows = np.concatenate([each + low, each + low, each, each], 1) - SLACK
    highs = np.concatenate([each + high, each + high, *last], 1) + SLACK
    grid = [part.astype(np.float32) for part in geo.grid_parts(there, size, size)]
    return grid, lattice_parts(lattices[:, :3], size), lattice_parts(rows, size), lows, highs


def plan_motion(views: tuple[Placement, Placement], tap: Tap, size: Sequence[int]) -> list[np.ndarray]:
    """What a millimetre of motion changes of the twelve indices ``(2 B, 12, 3)``, and of the grids ``(2 B, 3, 3)``."""
    lattices, others = _lattices(views, tap)
    back, half = algebra.inverse(others)[:, :3, :3], len(lattices) // 2
    pull = np.zeros((2 * half, 12, 3))
    pull[:, 3:6] = back
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


def _sum(parts: Sequence[Tensor]) -> Tensor:
    d, h, w = parts
    return (d[:, :, None, None] + h[:, None, :, None] + w[:, None, None]).flatten(1, 3)


def _lookup(masks: Tensor, index: Tensor) -> Tensor:
    """Values ``(2, B, N)`` of masks ``(B, D, H, W)`` at indices ``(2, B, N, 3)``; those outside mean nothing."""
    depth, height, width = masks.shape[1:]
    i, j, k = index.unbind(-1)
    flat = ((i * height + j) * width + k).clamp_max(depth * height * width - 1)
    return masks.flatten(1).expand(2, -1, -1).gather(2, flat)
