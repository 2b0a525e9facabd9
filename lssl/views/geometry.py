"""Resampling and the exact alignment of feature maps; the algebra of :mod:`lssl.views.affines` under the same name.

Conventions (``align_corners=False`` throughout):

* index order is array order ``(D, H, W)``; index 0 is the centre of the first voxel; a voxel fills ``[i - ½, i + ½]``;
* a matrix ``A`` maps column vectors ``(i, j, k, 1)``; batches of matrices are ``(..., 4, 4)``;
* a view's matrix is ``A_V = A_src T_V`` (view index → source index → frame in mm);
* a feature map of stride ``s`` and centre offset ``δ`` has ``S = [diag(s) | δ]`` (feature index → view index), hence
  ``G = A_V S`` (feature index → frame in mm), and the feature index of view 2 that shows the same point as feature
  index ``f`` of view 1 is ``C f`` with ``C = G₂⁻¹ G₁``.

Matrices are kept in float64 (they are tiny); sampling grids are float32, never half, also under autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lssl.views.affines import (
    Array,
    about,
    contains,
    feature_affine,
    flip,
    homogeneous,
    inverse,
    rotation,
    scaling,
    spacing,
    transform,
    translation,
    volume,
)

__all__ = [
    "about",
    "align",
    "centre_of_mass",
    "contains",
    "displace",
    "feature_affine",
    "flip",
    "grid_parts",
    "homogeneous",
    "inverse",
    "lattice",
    "normalise",
    "resample",
    "resample_mean",
    "resample_parts",
    "rotation",
    "sample",
    "sample_grid",
    "sample_nearest",
    "scaling",
    "spacing",
    "transform",
    "translation",
    "undisplace",
    "volume",
    "within",
]


def lattice(size: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    """All indices of a grid as ``(D·H·W, 3)``, last axis fastest."""
    axes = [torch.arange(n, device=device, dtype=dtype) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)


def normalise(size: Sequence[int]) -> np.ndarray:
    """Index → torch's normalised coordinate ``u = (2 i + 1) / n - 1``, still in array order; ``(4, 4)``."""
    matrix = np.eye(4)
    for axis, n in enumerate(size):
        matrix[axis, axis], matrix[axis, 3] = 2 / n, 1 / n - 1
    return matrix


def _like(matrix: np.ndarray, like: Array) -> Array:
    return matrix if isinstance(like, np.ndarray) else torch.from_numpy(matrix).to(like)


def _interpolate(volume: Tensor, grid: Tensor, mode: str, padding: str) -> Tensor:
    """``grid_sample`` in float32 (float64 if the volume is), whatever autocast says; ``grid`` is in array order."""
    dtype = torch.float64 if volume.dtype == torch.float64 else torch.float32
    return sample_grid(volume, grid.to(dtype).flip(-1), mode, padding)  # torch wants (x, y, z) = (W, H, D)


def sample_grid(volume: Tensor, grid: Tensor, mode: str, padding: str) -> Tensor:
    """``grid_sample`` in the grid's type, whatever autocast says; ``grid`` is in torch's order."""
    with torch.autocast(volume.device.type, enabled=False):
        return F.grid_sample(volume.to(grid.dtype), grid, mode=mode, padding_mode=padding, align_corners=False)


def resample(
    volume: Tensor, matrix: Tensor, size: Sequence[int], mode: str = "bilinear", padding: str = "zeros"
) -> Tensor:
    """Samples ``volume (B, C, ...)`` on a new grid; ``matrix (B, 4, 4)`` maps new index → index of ``volume``.

    Returns ``(B, C, *size)``.
    """
    dtype = torch.float64 if volume.dtype == torch.float64 else torch.float32
    parts = grid_parts(matrix, volume.shape[-3:], size)
    return resample_parts(volume, [part.to(dtype) for part in parts], mode, padding)


def grid_parts(matrix: Array, source: Sequence[int], size: Sequence[int]) -> list[Array]:
    """A sampling grid, which is separable, as the three small ones ``(B, n, 3)`` whose sum it is.

    Args:
        matrix: ``(B, 4, 4)``, new index → index of the volume.
        source: voxels of the volume.
        size: voxels of the new grid.
    """
    rows = (_like(normalise(source), matrix) @ matrix)[:, [2, 1, 0]]  # torch wants (x, y, z) = (W, H, D)
    parts = []
    for axis, n in enumerate(size):
        steps: Any = np.arange(n, dtype=np.float64)
        if isinstance(matrix, Tensor):
            steps = torch.arange(n, device=matrix.device, dtype=matrix.dtype)
        parts.append(rows[:, None, :, axis] * steps[:, None])
    parts[0] = parts[0] + rows[:, None, :, 3]
    return parts


def resample_parts(
    volume: Tensor,
    parts: Sequence[Tensor],
    mode: str = "bilinear",
    padding: str = "zeros",
    shift: Tensor | None = None,
) -> Tensor:
    """:func:`resample` with the parts of its grid, in float32 or float64; one grid may serve all volumes.

    Each place of the grid may be moved by a ``shift (B, d, h, w, 3)`` of its own.
    """
    d, h, w = parts
    grid = d[:, :, None, None] + h[:, None, :, None] + w[:, None, None, :]
    grid = grid if shift is None else grid + shift
    return sample_grid(volume, grid.expand(len(volume), -1, -1, -1, -1), mode, padding)


def resample_mean(volume: Tensor, matrix: Tensor, size: Sequence[int], samples: Sequence[int]) -> Tensor:
    """:func:`resample`, with each new voxel the mean of ``samples`` along each axis, evenly spaced within it."""
    if all(many == 1 for many in samples):
        return resample(volume, matrix, size)
    fine = resample(volume, matrix @ within(samples, matrix), [n * k for n, k in zip(size, samples, strict=True)])
    return F.avg_pool3d(fine, tuple(samples))


def within(samples: Sequence[int], like: Array) -> Array:
    """Index of samples evenly spaced within voxels → index of the voxels, ``(4, 4)``."""
    many = np.asarray(samples, dtype=np.float64)
    return _like(homogeneous(np.diag(1 / many), (1 / many - 1) / 2), like)


def sample(volume: Tensor, affine: Tensor, points: Tensor, mode: str = "bilinear", padding: str = "border") -> Tensor:
    """Values of ``volume (B, C, ...)`` at points of the frame.

    Args:
        volume: features or images.
        affine: ``(B, 4, 4)``, index of ``volume`` → frame in mm.
        points: ``(B, N, 3)`` in mm.
        mode: ``bilinear`` (trilinear here) or ``nearest``.
        padding: what lies beyond the outer voxels, as in ``grid_sample``.

    Returns:
        ``(B, N, C)``, differentiable with respect to ``volume``.
    """
    grid = transform(_like(normalise(volume.shape[-3:]), affine) @ inverse(affine), points.to(affine.dtype))
    return _interpolate(volume, grid[:, :, None, None], mode, padding).flatten(2).transpose(1, 2)


def displace(points: Tensor, field: Tensor, affine: Tensor) -> Tensor:
    """``p + u(p)``: points of the frame moved by a displacement field, as a non-rigid registration gives.

    Args:
        points: ``(B, N, 3)`` mm.
        field: ``(B, 3, D, H, W)`` mm, u along the frame's axes; 0 beyond its outer voxels.
        affine: ``(B, 4, 4)``, index of ``field`` → frame.
    """
    return points + sample(field, affine, points, padding="zeros").to(points.dtype)


def undisplace(points: Tensor, field: Tensor, affine: Tensor, rounds: int = 50) -> Tensor:
    """The points that :func:`displace` moves to ``points``, by ``p ← q - u(p)``, which converges where u is mild.

    (Its derivative must stay below 1, so that the field folds nothing.)
    """
    found = points
    for _ in range(rounds):
        found = points - sample(field, affine, found, padding="zeros").to(points.dtype)
    return found


def sample_nearest(volume: Tensor, affine: Tensor, points: Tensor, outside: float) -> Tensor:
    """Values ``(B, N)`` of masks or labels ``(B, D, H, W)`` of any type at the voxels nearest to points of the frame.

    Nothing but the points is touched, so a large source costs no more than a small one.
    """
    index = transform(inverse(affine), points.to(affine.dtype)).round().long()
    size = torch.tensor(volume.shape[-3:], device=index.device)
    inside = ((index >= 0) & (index < size)).all(-1)
    i, j, k = index.clamp_min(0).minimum(size - 1).unbind(-1)
    values = volume.flatten(1).gather(1, (i * size[1] + j) * size[2] + k)
    return values.masked_fill(~inside, outside)


def align(
    features: Tensor, affine: Tensor, onto: Tensor, size: Sequence[int], margin: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Resamples features of view 2 onto view 1's feature lattice, through the frame.

    Args:
        features: ``(B, C, ...)`` of view 2.
        affine: ``G₂ (B, 4, 4)``, feature index of view 2 → frame (:func:`feature_affine`).
        onto: ``G₁ (B, 4, 4)``, feature index of view 1 → frame.
        size: view 1's lattice ``(D, H, W)``.
        margin: features to keep away from the border of both lattices, where padded convolutions see nothing real.

    Returns:
        ``(B, C, *size)`` features and ``(B, *size)`` bool, false where view 2 does not show the point (or a border of
        either view is nearer than ``margin``); there the features are meaningless.
    """
    correspondence = inverse(affine) @ onto
    own = lattice(size, affine.device, affine.dtype)
    valid = contains(transform(correspondence, own), features.shape[-3:], margin) & contains(own, size, margin)
    aligned = resample(features, correspondence, size, padding="border")
    return aligned, valid.unflatten(1, tuple(size))


def centre_of_mass(mask: Tensor) -> Tensor:
    """``(B, 3)`` mean index of ``(B, D, H, W)`` masks; the middle of the grid for an empty mask."""
    total = mask.flatten(1).sum(1).double()
    centre = []
    for axis, n in enumerate(mask.shape[1:]):
        others = [a for a in (1, 2, 3) if a != axis + 1]
        profile = mask.sum(others).double()
        moment = (profile * torch.arange(n, device=mask.device)).sum(1)
        centre.append(torch.where(total > 0, moment / total.clamp_min(1), (n - 1) / 2))
    return torch.stack(centre, 1)
