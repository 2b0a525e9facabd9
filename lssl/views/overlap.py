"""The volume that two boxes share, exactly."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from lssl.views import affines

__all__ = ["shared_volume"]

_PLANES = 12  # three, and their opposites, of each box
_LINES = [(i, j) for i, j in itertools.combinations(range(_PLANES), 2) if (i // 6, i % 3) != (j // 6, j % 3)]
_I, _J = np.array(_LINES).T
_OWN = (np.arange(_PLANES) == _I[:, None]) | (np.arange(_PLANES) == _J[:, None])  # a line's own planes
_SHRUNK, _PARALLEL = 1e-9, 1e-6


def shared_volume(maps: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Volume that a box shares with its own image under an affine map.

    The box holds the voxels of a view, of indices from -1/2 to ``size - 1/2``. What both contain is a polytope within
    12 planes, ``n_i · x ≤ h_i``, x from the box's centre. Each of its edges is the part of the line where two planes i
    and j meet that all other planes leave. Its volume is the sum of pyramids over its faces, and a face the sum of
    triangles over its edges; with θ the angle between two normals,

        V = 1/6 Σ_edges length · (h_i d_ij + h_j d_ji),        d_ij = (h_j - h_i cos θ) / sin θ.

    The image is taken smaller by a part in 10⁹, so that no planes coincide, and lines of planes that are parallel
    within 10⁻⁶ are left out, as they enclose no more than that.

    Args:
        maps: ``(..., 4, 4)`` float64, index → index of the box.
        size: ``(D, H, W)`` voxels of the box.

    Returns:
        ``(...)`` in voxels, to about a part in 10⁶.
    """
    half = np.asarray(size, dtype=np.float64) / 2
    back = affines.inverse(affines.translation(0.5 - half) @ maps @ affines.translation(half - 0.5))
    scale = affines.spacing(back.swapaxes(-1, -2))  # lengths of the rows
    normals, offsets = back[..., :3, :3] / scale[..., None], back[..., :3, 3] / scale
    reach, own = half * (1 - _SHRUNK) / scale, np.broadcast_to(np.eye(3), normals.shape)
    heights = np.broadcast_to(half, reach.shape)
    return _polytope_volume(
        np.concatenate([own, -own, normals, -normals], -2),
        np.concatenate([heights, heights, reach - offsets, reach + offsets], -1),
    )


def _polytope_volume(normals: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Volume of ``{x: n · x ≤ h}`` for unit normals ``(..., 12, 3)`` and heights ``(..., 12)`` of two boxes."""
    first, second, h_i, h_j = normals[..., _I, :], normals[..., _J, :], heights[..., _I], heights[..., _J]
    cross = affines.cross(first, second)
    sine = np.sqrt((cross * cross).sum(-1))
    meet = sine > _PARALLEL
    sine = np.where(meet, sine, 1.0)
    along = cross / sine[..., None]
    start = affines.cross(h_i[..., None] * second - h_j[..., None] * first, along) / sine[..., None]
    across = normals.swapaxes(-1, -2)
    slope = along @ across  # (..., lines, planes)
    room = heights[..., None, :] - start @ across
    room[..., _OWN] = np.inf
    level = abs(slope) < 1e-12
    bound = room / np.where(level, 1.0, slope)
    outside = (level & (room < 0)).any(-1)
    end = np.where((slope > 0) & ~level, bound, np.inf).min(-1)
    begin = np.where((slope < 0) & ~level, bound, -np.inf).max(-1)
    meet &= ~outside
    length = np.clip(np.where(meet, end, 0.0) - np.where(meet, begin, 0.0), 0, None)
    less = np.square(first - second).sum(-1) / 2  # 1 - cos θ, without loss of digits
    weight = (less * (h_i * h_i + h_j * h_j) - np.square(h_i - h_j)) / sine
    return (length * weight).sum(-1) / 6
