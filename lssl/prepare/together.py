r"""The last step of registration: one rigid map that serves both directions at once.

Mutual information of the first image with the second one, at places of the first, has another optimum than that of the
second with the first. Where contrasts differ or slices are thick, the two lie up to two millimetres apart, and their
middle is not the best map either. So this maximises their sum over small motions :math:`\xi` of the half-way space,

.. math:: I(\xi) = I_1(m) + I_2(m^{-1}), \qquad m = S \exp(\xi) S, \quad S^2 = \text{start},

with :math:`I_1` the mutual information of the first image at places p of its foreground and the second one at m(p),
and :math:`I_2` the reverse. Values are shared linearly between neighbouring bins of a joint histogram h, and
:math:`I = \sum_{ij} h_{ij} \log (h_{ij} / h_{i \cdot} h_{\cdot j})` in nats. Places lie at random between the voxels:
on the voxels themselves, mutual information favours whole-voxel shifts. Powell's method (1964) needs no derivative; it
takes some 200 evaluations, two seconds.

``benchmarks/bench_registration.py`` measures the error on real pairs: 0.2 to 0.4 mm, where the middle of both
directions has 0.2 to 1.0 mm.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import map_coordinates
from scipy.optimize import minimize

from lssl.prepare.transforms import between, displacement, exponential, logarithm
from lssl.prepare.volumes import LPS

__all__ = ["best_together", "refine_together"]

BINS = 32
PLACES = 20_000
CLOSE = 1.0  # mm: directions that agree so well lie in one basin, so one search from their middle does
REACH = 6.0  # mm of motion about each axis, at most: the start is in the right basin
LEVER = 60.0  # mm: at this distance from the centre a turn moves as far as a shift of the same number


def best_together(
    images: Sequence[sitk.Image],
    masks: Sequence[sitk.Image],
    ends: tuple[np.ndarray, np.ndarray],
    centres: Sequence[np.ndarray],
    points: np.ndarray,
) -> tuple[np.ndarray, float]:
    """The rigid map that is best for both directions, and how much they disagree.

    Args:
        images: two images of one head.
        masks: where each is looked at, on its grid.
        ends: each direction's own result, both ``(4, 4)``, point of the first → point of the second, mm (RAS+).
        centres: ``(3,)`` middle of the head in each, mm.
        points: ``(N, 3)`` of the first head, mm.

    Returns:
        ``(4, 4)``, and a mean distance over the points, mm: between the ends; where these are more than :data:`CLOSE`
        apart, between the maps that are found from the one end and from the other. So a pair of two contrasts,
        whose own optima lie apart, is doubted only if there is no map that both ends lead to.
    """
    apart = displacement(*ends, points)
    starts = ends if apart > CLOSE else (between(ends[0], np.linalg.inv(ends[1])),)
    found = [refine_together(images, masks, start, centres) for start in starts]
    if len(found) == 2:
        apart = displacement(found[0][0], found[1][0], points)
    return max(found, key=lambda case: case[1])[0], apart


def refine_together(
    images: Sequence[sitk.Image], masks: Sequence[sitk.Image], start: np.ndarray, centres: Sequence[np.ndarray]
) -> tuple[np.ndarray, float]:
    """The rigid map near ``start`` that is best for both directions; exchanging the images gives its inverse.

    Args:
        images: two images of one head.
        masks: where each is looked at, on its grid.
        start: ``(4, 4)``, point of the first → point of the second, mm (RAS+).
        centres: ``(3,)`` middle of the head in each, mm.

    Returns:
        ``(4, 4)``, ``start`` where nothing is better, or a mask is empty; and :math:`I` there, nats.
    """
    if _name(images[0]) > _name(images[1]):  # the search itself is not the same from both ends
        back, information = refine_together(images[::-1], masks[::-1], np.linalg.inv(start), centres[::-1])
        return np.linalg.inv(back), information
    if not all(sitk.GetArrayViewFromImage(mask).any() for mask in masks):
        return start, 0.0
    half = exponential(0.5 * logarithm(start.round(10)))  # the same bits from both ends: the search amplifies rounding
    centre = half[:3, :3] @ centres[0] + half[:3, 3]
    to, back = np.eye(4), np.eye(4)
    to[:3, 3], back[:3, 3] = centre, -centre
    one, two = (_Direction(images[n], masks[n], images[1 - n], masks[1 - n]) for n in (0, 1))

    def moved(step: np.ndarray) -> np.ndarray:
        return half @ to @ exponential(_tangent(step)) @ back @ half

    def cost(step: np.ndarray) -> float:
        matrix = moved(step)
        return -one.information(matrix) - two.information(np.linalg.inv(matrix))

    options = {"xtol": 0.02, "ftol": 1e-5, "maxiter": 4}
    found = minimize(cost, np.zeros(6), method="Powell", bounds=[(-REACH, REACH)] * 6, options=options)
    unmoved = cost(np.zeros(6))
    return (moved(found.x), -found.fun) if found.fun < unmoved - 1e-9 else (start, -unmoved)


def _tangent(step: np.ndarray) -> np.ndarray:
    """``(4, 4)`` of three turns, in mm at :data:`LEVER`, and three shifts in mm."""
    x, y, z = step[:3] / LEVER
    return np.array([[0, -z, y, step[3]], [z, 0, -x, step[4]], [-y, x, 0, step[5]], [0, 0, 0, 0]])


def _name(image: sitk.Image) -> tuple[float, ...]:
    """Tells two images apart, whichever comes first."""
    return float(sitk.GetArrayViewFromImage(image).sum(dtype=np.float64)), *image.GetSize(), *image.GetOrigin()


def _index_to_mm(image: sitk.Image) -> np.ndarray:
    """``(4, 4)``, index in the order of the array's axes → mm (RAS+)."""
    matrix = np.eye(4)
    matrix[:3, :3] = (np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing()))[:, ::-1]
    matrix[:3, 3] = image.GetOrigin()
    return np.asarray(LPS @ matrix)


class _Direction:
    """Mutual information of an image with another one, at random places of its mask."""

    def __init__(self, fixed: sitk.Image, mask: sitk.Image, moving: sitk.Image, seen: sitk.Image) -> None:
        draws, values = np.random.default_rng(0), sitk.GetArrayFromImage(fixed)
        inside = np.argwhere(sitk.GetArrayViewFromImage(mask))
        index = inside[draws.integers(len(inside), size=PLACES)] + draws.uniform(-0.5, 0.5, (PLACES, 3))
        self.bins = _in_bins(map_coordinates(values, index.T, order=1, mode="nearest"), values, mask)
        self.places = _index_to_mm(fixed) @ np.concatenate([index.T, np.ones((1, PLACES))])
        self.moving, self.to_index = sitk.GetArrayFromImage(moving), np.linalg.inv(_index_to_mm(moving))
        self.moving = _in_bins(self.moving, self.moving, seen)
        self.last = np.array(self.moving.shape)[:, None] - 1

    def information(self, matrix: np.ndarray) -> float:
        """Nats, of the places that fall into the other image.

        Args:
            matrix: ``(4, 4)`` point of the image → point of the other one, mm.
        """
        index = (self.to_index @ matrix @ self.places)[:3]
        inside = ((index >= 0) & (index <= self.last)).all(0)
        if not inside.any():
            return 0.0
        other = map_coordinates(self.moving, index[:, inside], order=1, mode="nearest")
        return mutual_information(self.bins[inside], other)


def _in_bins(values: np.ndarray, image: np.ndarray, mask: sitk.Image) -> np.ndarray:
    """Values as places between the histogram's bins, by the range of an image within a mask."""
    low, high = np.quantile(image[sitk.GetArrayViewFromImage(mask) > 0], [0.001, 0.999])
    return ((values - low) / max(high - low, 1e-12)).clip(0, 1) * (BINS - 1)


def mutual_information(one: np.ndarray, other: np.ndarray) -> float:
    """Nats, from values ``(N,)`` between 0 and :data:`BINS` - 1, each shared by its two neighbouring bins."""
    i, j = (values.astype(int).clip(0, BINS - 2) for values in (one, other))
    a, b = one - i, other - j
    shares = ((0, (1 - a) * (1 - b)), (1, (1 - a) * b), (BINS, a * (1 - b)), (BINS + 1, a * b))
    counts = sum(np.bincount(i * BINS + j + step, share, BINS * BINS) for step, share in shares)
    joint = np.asarray(counts).reshape(BINS, BINS) / len(one)
    alone = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    known = joint > 0
    return float((joint[known] * np.log(joint[known] / alone[known])).sum())
