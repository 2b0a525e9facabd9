"""The volume that two boxes share, exactly."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lssl.views import geometry as geo

__all__ = ["shared_volume"]

_PLANES = 12  # three, and their opposites, of each box
_LINES = [(i, j) for i, j in itertools.combinations(range(_PLANES), 2) if (i // 6, i % 3) != (j // 6, j % 3)]
_SHRUNK, _PARALLEL = 1e-9, 1e-6


def shared_volume(maps: Tensor, size: Sequence[int]) -> Tensor:
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
    half = torch.tensor(size, dtype=maps.dtype, device=maps.device) / 2
    back = geo.inverse(geo.translation(0.5 - half) @ maps @ geo.translation(half - 0.5))
    normals, scale = back[..., :3, :3], back[..., :3, :3].norm(dim=-1)
    normals, offsets = normals / scale[..., None], back[..., :3, 3] / scale
    reach, own = half * (1 - _SHRUNK) / scale, torch.eye(3, dtype=maps.dtype, device=maps.device).expand_as(normals)
    return _polytope_volume(
        torch.cat([own, -own, normals, -normals], -2),
        torch.cat([half.expand_as(reach), half.expand_as(reach), reach - offsets, reach + offsets], -1),
    )


def _polytope_volume(normals: Tensor, heights: Tensor) -> Tensor:
    """Volume of ``{x: n · x ≤ h}`` for unit normals ``(..., 12, 3)`` and heights ``(..., 12)`` of two boxes."""
    i, j = torch.tensor(_LINES, device=normals.device).T
    first, second, h_i, h_j = normals[..., i, :], normals[..., j, :], heights[..., i], heights[..., j]
    cross = torch.linalg.cross(first, second)
    sine = cross.norm(dim=-1)
    meet = sine > _PARALLEL
    sine = torch.where(meet, sine, 1.0)
    along = cross / sine[..., None]
    start = torch.linalg.cross(h_i[..., None] * second - h_j[..., None] * first, along) / sine[..., None]
    slope = along @ normals.transpose(-1, -2)  # (..., lines, planes)
    room = heights[..., None, :] - start @ normals.transpose(-1, -2)
    planes = torch.arange(_PLANES, device=normals.device)
    room = room.masked_fill((planes == i[:, None]) | (planes == j[:, None]), float("inf"))
    level = slope.abs() < 1e-12
    bound = room / torch.where(level, 1.0, slope)
    outside = (level & (room < 0)).any(-1)
    end = torch.where((slope > 0) & ~level, bound, float("inf")).amin(-1)
    begin = torch.where((slope < 0) & ~level, bound, -float("inf")).amax(-1)
    length = torch.where(meet & ~outside, (end - begin).clamp_min(0), 0.0)
    less = (first - second).square().sum(-1) / 2  # 1 - cos θ, without loss of digits
    weight = (less * (h_i.square() + h_j.square()) - (h_i - h_j).square()) / sine
    return (length * weight).sum(-1) / 6
