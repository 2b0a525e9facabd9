"""4×4 affine algebra, for numpy arrays on the host and for tensors alike.

A training step plans on the host: its matrices are float64 arrays, where an operation takes a microsecond, and only
what the device needs is sent, once. Evaluation uses the same functions on tensors.

Conventions: see :mod:`lssl.views.geometry`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Array",
    "about",
    "contains",
    "cross",
    "feature_affine",
    "flip",
    "homogeneous",
    "inverse",
    "rotation",
    "scaling",
    "spacing",
    "transform",
    "translation",
    "turn",
    "volume",
]

Array = TypeVar("Array", Tensor, np.ndarray)
"""A tensor, or an array on the host."""
_NEXT, _AFTER = np.array([1, 2, 0]), np.array([2, 0, 1])


def _like(values: Any, like: Any) -> Any:
    """Values of the kind, type and place of ``like``."""
    if isinstance(like, np.ndarray):
        return np.asarray(values, dtype=like.dtype)
    return torch.as_tensor(values, dtype=like.dtype, device=like.device)


def _zeros(like: Any, shape: Sequence[int]) -> Any:
    return np.zeros(shape, like.dtype) if isinstance(like, np.ndarray) else like.new_zeros(shape)


def cross(a: Any, b: Any) -> Any:
    """Cross product along the last axis."""
    if isinstance(a, Tensor):
        return torch.linalg.cross(a, b)
    return a.take(_NEXT, -1) * b.take(_AFTER, -1) - a.take(_AFTER, -1) * b.take(_NEXT, -1)


def homogeneous(linear: Array, offset: Array) -> Array:
    """``[linear | offset]`` as ``(..., 4, 4)`` from ``(..., 3, 3)`` and ``(..., 3)``."""
    shapes: Any = linear.shape[:-2], offset.shape[:-1]
    ahead: Any = shapes[0] if shapes[0] == shapes[1] else np.broadcast_shapes(*shapes)  # which is slow
    matrix: Any = _zeros(linear, (*ahead, 4, 4))
    matrix[..., :3, :3] = linear
    matrix[..., :3, 3] = offset
    matrix[..., 3, 3] = 1
    return matrix


def translation(offset: Array) -> Array:
    """Shift by ``(..., 3)``."""
    return homogeneous(_like(np.eye(3), offset), offset)


def scaling(factors: Array) -> Array:
    """Scale each axis by ``(..., 3)``."""
    return homogeneous(factors[..., None] * _like(np.eye(3), factors), _zeros(factors, (3,)))


def rotation(angles: Array) -> Array:
    """Rotation by ``(..., 3)`` radians about the first, then the second, then the third axis."""
    return homogeneous(turn(angles), _zeros(angles, (3,)))


def turn(angles: Array) -> Array:
    """The linear part ``(..., 3, 3)`` of :func:`rotation`."""
    functions: Any = np if isinstance(angles, np.ndarray) else torch
    (a, b, c), (sin_a, sin_b, sin_c) = (
        (values[..., 0], values[..., 1], values[..., 2]) for values in (functions.cos(angles), functions.sin(angles))
    )
    across, along = sin_b * sin_a, sin_b * a
    total: Any = _zeros(angles, (*angles.shape, 3))
    total[..., 0, 0], total[..., 0, 1], total[..., 0, 2] = c * b, c * across - sin_c * a, c * along + sin_c * sin_a
    total[..., 1, 0], total[..., 1, 1], total[..., 1, 2] = sin_c * b, sin_c * across + c * a, sin_c * along - c * sin_a
    total[..., 2, 0], total[..., 2, 1], total[..., 2, 2] = -sin_b, b * sin_a, b * a
    return total


def flip(flags: Array, size: Sequence[int]) -> Array:
    """Mirror the axes where ``flags (..., 3)`` is true: ``v → n - 1 - v``, which keeps the voxel grid."""
    mirrored: Any = flags.astype(np.float64) if isinstance(flags, np.ndarray) else flags.double()
    last = _like(size, mirrored) - 1
    return homogeneous(scaling(1 - 2 * mirrored)[..., :3, :3], mirrored * last)


def about(matrix: Array, centre: Array) -> Array:
    """The linear map ``matrix`` with ``centre (..., 3)`` as its fixed point."""
    return translation(centre) @ matrix @ translation(-centre)


def inverse(affine: Array) -> Array:
    """Inverse of ``(..., 4, 4)``; of tensors in closed form, because ``torch.linalg.inv`` would wait for the device."""
    if isinstance(affine, np.ndarray):
        return np.linalg.inv(affine)
    a, b, c = (affine[..., :3, column] for column in range(3))
    normals = [cross(b, c), cross(c, a), cross(a, b)]
    linear = torch.stack(normals, -2) / (a * normals[0]).sum(-1)[..., None, None]
    return homogeneous(linear, -(linear @ affine[..., :3, 3:])[..., 0])


def transform(affine: Array, points: Array) -> Array:
    """Applies ``(..., 4, 4)`` to points ``(..., N, 3)``."""
    return points @ affine[..., :3, :3].swapaxes(-1, -2) + affine[..., None, :3, 3]


def spacing(affine: Array) -> Array:
    """Voxel size in mm along each index axis, ``(..., 3)``."""
    linear = affine[..., :3, :3]
    return (linear * linear).sum(-2) ** 0.5


def volume(affine: Array) -> Array:
    """Volume of a voxel, ``|det|`` of ``(..., 4, 4)``; a closed form, for the same reason as :func:`inverse`."""
    a, b, c = (affine[..., :3, column] for column in range(3))
    return abs((a * cross(b, c)).sum(-1))


def feature_affine(view_affine: Array, stride: Sequence[float], offset: Sequence[float]) -> Array:
    """``G = A_V S``: feature index → frame, for a tap of this stride and centre offset (in view voxels)."""
    steps, shift = _like(stride, view_affine), _like(offset, view_affine)
    linear = view_affine[..., :3, :3]
    return homogeneous(linear * steps, linear @ shift + view_affine[..., :3, 3])


def contains(index: Array, size: Sequence[int] | Array, margin: float = 0.0) -> Array:
    """Which indices ``(..., 3)`` lie at least ``margin`` inside the first and last voxel *centres* of a grid.

    ``margin = -0.5`` asks for the grid's outer faces instead. A billionth of a voxel is forgiven, so that rounding
    never drops the border of two identical lattices.
    """
    last = _like(size, index) - 1
    slack = 1e-9
    return ((index >= margin - slack) & (index <= last - margin + slack)).all(-1)
