"""The volume that two boxes share, exactly."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from lssl.views import affines

__all__ = ["shared_volume"]

_SLABS = 6  # three of each box, between two parallel faces
_A, _B = np.array(list(itertools.combinations(range(_SLABS), 2))).T
_SIGN_A, _SIGN_B = np.array(list(itertools.product((1.0, -1.0), repeat=2))).T[..., None, None]  # of faces of two slabs
_EACH, _X = np.arange(_SLABS)[:, None], np.arange(3)
_OWN = np.where((_EACH == _A) | (_EACH == _B), np.inf, 0.0)[:, None, :, None]  # a line's own slabs do not bound it
_NEXT, _AFTER = np.roll(_X, -1), np.roll(_X, 1)
_SHRUNK, _PARALLEL = 1e-9, 1e-6


def shared_volume(maps: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Volume that a box shares with its own image under an affine map.

    The box holds the voxels of a view, of indices from -1/2 to ``size - 1/2``. What both contain is a polytope within
    six slabs, three of each box. Each of its edges is the part of the line where a face i of one slab meets a face j of
    another that all other slabs leave. With faces ``n_i · x ≤ h_i``, x from the box's centre, its volume is the sum of
    pyramids over its faces, and a face the sum of triangles over its edges; with θ the angle between two normals,

        V = 1/6 Σ_edges length · (h_i d_ij + h_j d_ji),        d_ij = (h_j - h_i cos θ) / sin θ.

    The image is taken smaller by a part in 10⁹, so that no faces coincide, and lines of faces that are parallel
    within 10⁻⁶ are left out, as they enclose no more than that.

    Args:
        maps: ``(..., 4, 4)`` float64, index → index of the box.
        size: ``(D, H, W)`` voxels of the box.

    Returns:
        ``(...)`` in voxels, to about a part in 10⁶.
    """
    half = np.asarray(size, dtype=np.float64) / 2
    back, centre = affines.inverse(maps.reshape(-1, 4, 4)), half - 0.5
    linear = back[:, :3, :3]
    offset = linear @ centre + back[:, :3, 3] - centre
    scale = np.sqrt((linear * linear).sum(-1))  # lengths of the rows
    normals, middle, reach = (np.zeros((*shape, len(back))) for shape in ((3, _SLABS), (_SLABS,), (_SLABS,)))
    normals[_X, _X], normals[:, 3:] = 1, (linear / scale[..., None]).T
    reach[:3], reach[3:] = half[:, None], (half * (1 - _SHRUNK) / scale).T
    middle[3:] = (-offset / scale).T
    return _polytope_volume(normals, middle, reach).reshape(maps.shape[:-2])


def _polytope_volume(normals: np.ndarray, middle: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Volumes ``(N,)`` of ``{x: |n · x - m| ≤ h}`` for six slabs.

    Many small polytopes are fast with N as the last axis.

    Args:
        normals: ``(3, 6, N)``, unit normals n.
        middle: ``(6, N)``, m.
        half: ``(6, N)``, h.
    """
    first, second = normals.take(_A, 1), normals.take(_B, 1)
    along = _cross(first, second)  # (3, 15, N), the directions of the lines
    sine = np.sqrt((along * along).sum(0))
    meet = sine > _PARALLEL
    sine = np.where(meet, sine, 1.0)
    along /= sine
    # Where faces lie along their normals, (4, 15, N); nearly equal faces are subtracted before they are divided
    place_a = middle.take(_A, 0) + half.take(_A, 0) * _SIGN_A
    place_b = middle.take(_B, 0) + half.take(_B, 0) * _SIGN_B
    start = _cross(place_a * second[:, None] - place_b * first[:, None], along[:, None]) / sine
    slope = (normals[:, :, None] * along[:, None]).sum(0)[:, None]  # (6, 1, 15, N)
    slope[abs(slope) < 1e-12] = 1e-30  # such a slab holds far more than all of a line, or nothing
    room = middle[:, None, None] - (normals[:, :, None, None] * start[:, None]).sum(0)  # (6, 4, 15, N)
    room *= np.sign(slope)
    slope, reach = abs(slope), half[:, None, None] + _OWN
    length = ((room + reach) / slope).min(0) - ((room - reach) / slope).max(0)
    # 1 - cos θ, without loss of digits
    less = np.where(_SIGN_A == _SIGN_B, *(((first + s * second) ** 2).sum(0) / 2 for s in (-1, 1)))
    weight = (less * (place_a**2 + place_b**2) - (place_a * _SIGN_A - place_b * _SIGN_B) ** 2) / sine
    return (np.where(meet, length, 0.0).clip(0) * weight).sum((0, 1)) / 6


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cross product along the first axis."""
    return a.take(_NEXT, 0) * b.take(_AFTER, 0) - a.take(_AFTER, 0) * b.take(_NEXT, 0)
