"""4×4 affine algebra, resampling, and the exact alignment of feature maps.

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

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "about",
    "align",
    "centre_of_mass",
    "contains",
    "displace",
    "feature_affine",
    "flip",
    "homogeneous",
    "inverse",
    "lattice",
    "resample",
    "resample_mean",
    "rotation",
    "sample",
    "sample_nearest",
    "scaling",
    "spacing",
    "transform",
    "translation",
    "undisplace",
    "volume",
]


def homogeneous(linear: Tensor, offset: Tensor) -> Tensor:
    """``[linear | offset]`` as ``(..., 4, 4)`` from ``(..., 3, 3)`` and ``(..., 3)``."""
    top = torch.cat([linear, offset.unsqueeze(-1)], -1)
    bottom = torch.zeros_like(top[..., :1, :])
    bottom[..., 3] = 1
    return torch.cat([top, bottom], -2)


def translation(offset: Tensor) -> Tensor:
    """Shift by ``(..., 3)``."""
    return homogeneous(torch.eye(3, dtype=offset.dtype, device=offset.device).expand(*offset.shape, 3), offset)


def scaling(factors: Tensor) -> Tensor:
    """Scale each axis by ``(..., 3)``."""
    return homogeneous(torch.diag_embed(factors), torch.zeros_like(factors))


def rotation(angles: Tensor) -> Tensor:
    """Rotation by ``(..., 3)`` radians about the first, then the second, then the third axis."""
    cos, sin = angles.cos(), angles.sin()
    total = torch.eye(3, dtype=angles.dtype, device=angles.device).expand(*angles.shape, 3)
    for axis in range(3):
        b, c = (axis + 1) % 3, (axis + 2) % 3
        turn = torch.eye(3, dtype=angles.dtype, device=angles.device).repeat(*angles.shape[:-1], 1, 1)
        turn[..., b, b] = turn[..., c, c] = cos[..., axis]
        turn[..., b, c], turn[..., c, b] = -sin[..., axis], sin[..., axis]
        total = turn @ total
    return homogeneous(total, torch.zeros_like(angles))


def flip(flags: Tensor, size: Sequence[int]) -> Tensor:
    """Mirror the axes where ``flags (..., 3)`` is true: ``v → n - 1 - v``, which keeps the voxel grid."""
    flags = flags.double()
    last = torch.tensor(size, dtype=flags.dtype, device=flags.device) - 1
    return homogeneous(torch.diag_embed(1 - 2 * flags), flags * last)


def about(matrix: Tensor, centre: Tensor) -> Tensor:
    """The linear map ``matrix`` with ``centre (..., 3)`` as its fixed point."""
    return translation(centre) @ matrix @ translation(-centre)


def inverse(affine: Tensor) -> Tensor:
    """Inverse of ``(..., 4, 4)`` affines in closed form: ``torch.linalg.inv`` would wait for the device."""
    a, b, c = affine[..., :3, 0], affine[..., :3, 1], affine[..., :3, 2]
    cross = torch.linalg.cross
    rows = torch.stack([cross(b, c), cross(c, a), cross(a, b)], -2)
    linear = rows / (a * cross(b, c)).sum(-1)[..., None, None]
    return homogeneous(linear, -(linear @ affine[..., :3, 3:]).squeeze(-1))


def transform(affine: Tensor, points: Tensor) -> Tensor:
    """Applies ``(..., 4, 4)`` to points ``(..., N, 3)``."""
    return points @ affine[..., :3, :3].transpose(-1, -2) + affine[..., None, :3, 3]


def spacing(affine: Tensor) -> Tensor:
    """Voxel size in mm along each index axis, ``(..., 3)``."""
    return affine[..., :3, :3].norm(dim=-2)


def volume(affine: Tensor) -> Tensor:
    """Volume of a voxel, ``|det|`` of ``(..., 4, 4)``; a closed form, for the same reason as :func:`inverse`."""
    a, b, c = affine[..., :3, 0], affine[..., :3, 1], affine[..., :3, 2]
    return (a * torch.linalg.cross(b, c)).sum(-1).abs()


def lattice(size: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    """All indices of a grid as ``(D·H·W, 3)``, last axis fastest."""
    axes = [torch.arange(n, device=device, dtype=dtype) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)


def feature_affine(view_affine: Tensor, stride: Sequence[float], offset: Sequence[float]) -> Tensor:
    """``G = A_V S``: feature index → frame, for a tap of this stride and centre offset (in view voxels)."""
    diagonal, shift = (view_affine.new_tensor(values) for values in (stride, offset))
    return view_affine @ homogeneous(torch.diag(diagonal), shift)


def contains(index: Tensor, size: Sequence[int] | Tensor, margin: float = 0.0) -> Tensor:
    """Which indices ``(..., 3)`` lie at least ``margin`` inside the first and last voxel *centres* of a grid.

    ``margin = -0.5`` asks for the grid's outer faces instead. A billionth of a voxel is forgiven, so that rounding
    never drops the border of two identical lattices.
    """
    last = torch.as_tensor(size, device=index.device, dtype=index.dtype) - 1
    slack = 1e-9
    return ((index >= margin - slack) & (index <= last - margin + slack)).all(-1)


def _normalise(size: Sequence[int], like: Tensor) -> Tensor:
    """Index → torch's normalised coordinate ``u = (2 i + 1) / n - 1``, still in array order."""
    n = torch.tensor(size, dtype=like.dtype, device=like.device)
    return homogeneous(torch.diag(2 / n), 1 / n - 1)


def _interpolate(volume: Tensor, grid: Tensor, mode: str, padding: str) -> Tensor:
    """``grid_sample`` in float32 (float64 if the volume is), whatever autocast says; ``grid`` is in array order."""
    dtype = torch.float64 if volume.dtype == torch.float64 else torch.float32
    with torch.autocast(volume.device.type, enabled=False):
        grid = grid.to(dtype).flip(-1)  # torch wants (x, y, z) = (W, H, D)
        return F.grid_sample(volume.to(dtype), grid, mode=mode, padding_mode=padding, align_corners=False)


def resample(
    volume: Tensor, matrix: Tensor, size: Sequence[int], mode: str = "bilinear", padding: str = "zeros"
) -> Tensor:
    """Samples ``volume (B, C, ...)`` on a new grid; ``matrix (B, 4, 4)`` maps new index → index of ``volume``.

    Returns ``(B, C, *size)``. The grid is separable, so it is summed from three small ones rather than multiplied out.
    """
    theta = (_normalise(volume.shape[-3:], matrix) @ matrix)[:, :3]
    dtype = torch.float64 if volume.dtype == torch.float64 else torch.float32
    axes = [torch.arange(n, device=matrix.device, dtype=matrix.dtype) for n in size]
    d, h, w = ((theta[:, None, :, axis] * steps[:, None]).to(dtype) for axis, steps in enumerate(axes))
    offset = theta[:, None, None, None, :, 3].to(dtype)
    grid = (d[:, :, None, None] + offset) + h[:, None, :, None] + w[:, None, None, :]
    return _interpolate(volume, grid, mode, padding)


def resample_mean(volume: Tensor, matrix: Tensor, size: Sequence[int], samples: Sequence[int]) -> Tensor:
    """:func:`resample`, with each new voxel the mean of ``samples`` along each axis, evenly spaced within it."""
    if all(many == 1 for many in samples):
        return resample(volume, matrix, size)
    many = torch.tensor(samples, dtype=matrix.dtype, device=matrix.device)
    within = homogeneous(torch.diag(1 / many), (1 / many - 1) / 2)
    fine = resample(volume, matrix @ within, [n * k for n, k in zip(size, samples, strict=True)])
    return F.avg_pool3d(fine, tuple(samples))


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
    grid = transform(_normalise(volume.shape[-3:], affine) @ inverse(affine), points.to(affine.dtype))
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
