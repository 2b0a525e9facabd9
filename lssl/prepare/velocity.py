"""What moved within the heads of a subject: a stationary velocity field from the mean of its visits to each of them.

The maps ``φᵢ = exp(vᵢ)`` carry a place of the frame, in the mean of all visits, to the same tissue at visit i, and
``Σ vᵢ = 0``. No visit is the reference: their order changes nothing, ``exp(-vᵢ)`` leads back, and any two maps agree
with the third. The fields minimise, by Gauss-Newton steps,

    Σᵢ ∫ (Iᵢ∘φᵢ − mean)² / (2 σ²)  +  ½ ∫ BENDING |Δ vᵢ|² + STRETCH |∇vᵢ|²,

where σ² is the variance of the residual. ``I`` are the images with their brightness evened out, mapped on the others'
by a polynomial, as gamma and contrast differ between visits, and normalised within some :data:`NEAR` voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.sparse import csr_array

__all__ = ["KNOT", "compose", "determinant", "exponential", "interpolation", "knot_step", "on_grid", "velocities"]

KNOT = 4.0  # mm between the knots of a field, about
BENDING, STRETCH = 300.0, 30.0  # mm, 1/mm: weights of the penalties
STEPS = 6, 5  # Gauss-Newton steps on voxels as coarse as the knots, and on those that were given
SOLVER = 12  # steps of conjugate gradients in each
BRIGHTNESS = 15.0  # mm (σ) over which brightness is evened out
NEAR = 2.5  # voxels (σ) within which images are normalised: wide at first, so that no edge is taken for another
DEGREE = 4  # of the polynomial
FLAT = 0.05  # standard deviation below which nothing is to be seen, as a share of the mean brightness
AROUND = 4.0  # mm around the foreground that are looked at
_PAIRS = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))


def velocities(images: Sequence[np.ndarray], foregrounds: Sequence[np.ndarray], spacing: float) -> list[np.ndarray]:
    """The velocity field of each visit.

    Args:
        images: ``(D, H, W)`` float32 of N rigidly aligned visits on one grid, the background near 0 and tissue near 1.
        foregrounds: ``(D, H, W)`` bool.
        spacing: mm between voxels.

    Returns:
        N fields ``(3, d, h, w)`` float32 in mm along the grid's axes, at every k-th voxel from the first one on, where
        k is :data:`KNOT` / spacing, rounded, and at least 1.
    """
    factor = knot_step(spacing)
    fields = [np.zeros((3, *(-(-(n - 1) // factor) + 1 for n in images[0].shape)), np.float32) for _ in images]
    for shrink, steps in zip((factor, 1) if factor > 1 else (1,), STEPS if factor > 1 else (sum(STEPS),), strict=True):
        means = [_mean_matrix(n, shrink) for n in images[0].shape]
        level = [_along_axes(means, image.astype(np.float32)) for image in images]
        head = np.max([_along_axes(means, mask.astype(np.float32)) for mask in foregrounds], 0)
        weight = (gaussian_filter(head, AROUND / (spacing * shrink)) > 0.1).astype(np.float32)
        for _ in range(steps):
            fields = _step(fields, level, weight, spacing * shrink, factor // shrink)
    return fields


def knot_step(spacing: float) -> int:
    """Voxels of so many mm from one knot to the next."""
    return max(1, round(KNOT / spacing))


def _step(
    fields: list[np.ndarray], images: list[np.ndarray], weight: np.ndarray, spacing: float, factor: int
) -> list[np.ndarray]:
    """One Gauss-Newton step of all fields; voxels of ``spacing`` mm, ``factor`` of them between knots."""
    spread = [interpolation(n, factor) for n in images[0].shape]
    gather = [csr_array(matrix.T) for matrix in spread]
    knot = spacing * factor
    moved = [
        _sample(image, _along_axes(spread, exponential(field / knot) * np.float32(factor)))
        for image, field in zip(images, fields, strict=True)
    ]
    alike = _alike(moved, weight, spacing)
    mean = np.mean(alike, 0)
    misses = [mean - image for image in alike]
    number = len(images)
    variance = float(np.sum([(miss**2 * weight).sum() for miss in misses]) / weight.sum() / max(1, number - 1))
    scale = weight * np.float32(spacing**3 / max(variance, 1e-8))
    slope = np.stack([np.gradient(mean, spacing, axis=axis) for axis in range(3)]).astype(np.float32)
    curvature = _along_axes(gather, np.stack([scale * slope[a] * slope[b] for a, b in _PAIRS]))
    changed = []
    for field, miss in zip(fields, misses, strict=True):
        pull = _along_axes(gather, scale * miss * slope) - _penalty(field, knot)
        changed.append(field + _solve(curvature, pull, knot))
    middle = np.mean(changed, 0)
    return [field - middle for field in changed]


def _alike(images: list[np.ndarray], weight: np.ndarray, spacing: float) -> list[np.ndarray]:
    """Images that show the same brightness and contrast everywhere."""
    near = BRIGHTNESS / spacing
    whole = gaussian_filter(weight, near) + 0.05
    even = []
    for image in images:
        typical = float((image * weight).sum() / weight.sum())
        local = (gaussian_filter(image * weight, near) + 0.05 * typical) / whole
        even.append(np.clip(image / np.maximum(local, 0.1 * abs(typical) + 1e-6), 0, 4))
    whole = gaussian_filter(weight, NEAR) + 1e-3
    found = []
    for image in _as_the_mean(even, weight > 0):
        mean = gaussian_filter(image * weight, NEAR) / whole
        square = gaussian_filter(image**2 * weight, NEAR) / whole
        found.append((image - mean) / np.sqrt(np.maximum(square - mean**2, 0) + np.float32(FLAT**2)))
    return found


def _as_the_mean(images: list[np.ndarray], inside: np.ndarray) -> list[np.ndarray]:
    """Each image as the polynomial of itself that comes nearest to the mean of all."""
    target = np.mean(images, 0)[inside][::3].astype(np.float64)
    found = []
    for image in images:
        half = image / 2
        powers = half[inside][::3].astype(np.float64)[:, None] ** np.arange(DEGREE + 1)
        factors = np.linalg.lstsq(powers, target, rcond=None)[0]
        value = np.zeros_like(image)
        for factor in factors[::-1]:
            value = value * half + np.float32(factor)
        found.append(value)
    return found


def _solve(curvature: np.ndarray, pull: np.ndarray, knot: float) -> np.ndarray:
    """``δ`` with ``(H + penalty) δ = pull`` by preconditioned conjugate gradients."""
    diagonal = curvature[:3] + np.float32(42 * BENDING / knot + 6 * STRETCH * knot)
    found, rest = np.zeros_like(pull), pull.copy()
    guess = rest / diagonal
    direction, product = guess, float((rest * guess).sum())
    for _ in range(SOLVER):
        image = _penalty(direction, knot)
        for row, columns in enumerate(((0, 3, 4), (3, 1, 5), (4, 5, 2))):
            image[row] += sum(curvature[entry] * direction[axis] for axis, entry in enumerate(columns))
        length = product / max(float((direction * image).sum()), 1e-20)
        found += np.float32(length) * direction
        rest -= np.float32(length) * image
        guess = rest / diagonal
        before, product = product, float((rest * guess).sum())
        direction = guess + np.float32(product / max(before, 1e-20)) * direction
    return found


def _penalty(field: np.ndarray, knot: float) -> np.ndarray:
    """Gradient of the penalties, summed over knots."""
    bent = _laplacian(field)
    return np.float32(BENDING / knot) * _laplacian(bent) + np.float32(STRETCH * knot) * bent


def _laplacian(field: np.ndarray) -> np.ndarray:
    """Minus the Laplacian, in units of the knots; nothing pulls at the border."""
    found = np.zeros_like(field)
    for axis in (1, 2, 3):
        difference = np.diff(field, axis=axis)
        ends = [slice(None)] * 4
        low, high = list(ends), list(ends)
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        found[tuple(low)] -= difference
        found[tuple(high)] += difference
    return found


def interpolation(number: int, factor: int) -> Any:
    """Sparse ``(number, k)`` float32: linear interpolation to so many voxels from knots at every ``factor``-th."""
    knots = -(-(number - 1) // factor) + 1
    place = np.arange(number) / factor
    weight = np.maximum(1 - np.abs(place[:, None] - np.arange(knots)), 0)
    return csr_array(weight.astype(np.float32))  # sparse products take one thread, as `lssl prepare` promises


def on_grid(field: np.ndarray, size: Sequence[int], factor: int) -> np.ndarray:
    """A field at knots ``(3, d, h, w)`` at every voxel of a grid, ``(3, *size)``."""
    return _along_axes([interpolation(n, factor) for n in size], field)


def _mean_matrix(number: int, factor: int) -> Any:
    """Sparse ``(k, number)``: weighted means around every ``factor``-th voxel."""
    matrix = interpolation(number, factor).T
    return csr_array(matrix / matrix.sum(1)[:, None])


def _along_axes(matrices: Sequence[Any], values: np.ndarray) -> np.ndarray:
    """Applies a sparse matrix ``(new, old)`` along each of the last three axes."""
    for axis, matrix in enumerate(matrices, values.ndim - 3):
        ahead = np.moveaxis(values, axis, 0)
        flat = matrix @ np.ascontiguousarray(ahead).reshape(len(ahead), -1)
        values = np.moveaxis(flat.reshape(-1, *ahead.shape[1:]), 0, axis)
    return np.ascontiguousarray(values)


def _sample(volume: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    """Values of ``(D, H, W)`` at places moved by ``(3, D, H, W)`` voxels."""
    places = np.indices(volume.shape, dtype=np.float32) + displacement
    return map_coordinates(volume, places, order=1, mode="nearest", output=np.float32)


def compose(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Displacement ``(3, d, h, w)`` of one map after another, ``u(x) + w(x + u(x))``, in units of their grid."""
    return before + np.stack([_sample(axis, before) for axis in after])


def exponential(velocity: np.ndarray) -> np.ndarray:
    """Displacement of ``exp(v)`` by scaling and squaring, ``(3, d, h, w)`` in units of its grid."""
    longest = float(np.sqrt((velocity**2).sum(0)).max())
    halvings = max(0, int(np.ceil(np.log2(max(longest, 1e-6) / 0.25))))
    found = velocity / np.float32(2**halvings)
    for _ in range(halvings):
        found = compose(found, found)
    return found


def determinant(displacement: np.ndarray, spacing: float) -> np.ndarray:
    """``det (1 + ∂u/∂x)`` of a displacement ``(3, D, H, W)`` in mm, by central differences: the factor of volumes."""
    (a, b, c), (d, e, f), (g, h, i) = (
        [np.gradient(row, spacing, axis=axis) + np.float32(axis == number) for axis in range(3)]
        for number, row in enumerate(displacement)
    )
    return (a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)).astype(np.float32)
