"""The phantom's shapes: implicit functions of continuous canonical millimetres.

Canonical coordinates (x right, y front, z up, origin near the anterior commissure) have the average head's proportions.
A structure is a function that is negative inside and close to a distance in mm, so a head can be asked for at any point
and any spacing. Structures that come in pairs are evaluated once, at ``|x|``, and told apart by the sign of ``x``; size
and folding differ by side.

**Folds.** A hemisphere's points are projected from its centre onto an ellipsoidal shell, where a narrow-band random
field ``g(p) = Σ_m cos(k_m·p + φ_m)``, ``|k_m| ≈ 2π/25 mm``, is zero along a labyrinth of lines about 12 mm apart. They
are the sulci: with ``s = |g| / |∇g|`` the distance to the nearest sheet, ``e`` the depth below the hull and ``e_max``
the sulcus' own depth,

    d = sqrt(s² + max(0, e − e_max)²) − w

is the distance to the sulcus' wall, ``w`` its half width. The smooth minimum of ``d`` over folds, the fissure between
the hemispheres, the Sylvian fissure and the hull is the depth below the pia: CSF below 0, cortex up to its thickness,
white matter beyond. Cerebellar folia are made alike, from sheets that fan out from the cerebellum's axis.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from lssl.synthetic.phantom_subject import FOLD_WAVES, PhantomSubject, generator, waves

__all__ = ["TUBES", "cerebellum", "cerebrum", "ellipsoid", "folds", "mirrored", "slit", "smooth_min", "sylvian", "tube"]

# Polylines (x, y, z, radius) in mm on the right side; the left is their mirror image.
TUBES: dict[str, list[tuple[float, float, float, float]]] = {
    "ventricle": [
        (12, 31, 4, 2.5),
        (8, 22, 11, 4.5),
        (6.5, 8, 17, 4.2),
        (8.5, -12, 22, 4.0),
        (16, -30, 19, 5),
        (25, -42, 10, 6),
    ],
    "temporal horn": [(26, -42, 10, 5), (32, -33, -4, 3), (32, -20, -14, 2.4), (29, -9, -18, 1.6)],
    "occipital horn": [(26, -42, 10, 5.5), (25, -56, 7, 3.2), (22, -68, 5, 1.0)],
    "caudate": [(12, 19, 2, 5.2), (13.5, 12, 9, 5.4), (16, -2, 17, 3.6), (21, -20, 21, 2.4), (28, -34, 15, 1.8)],
    "hippocampus": [
        (23, -8, -20, 5.5),
        (27, -16, -17, 5.2),
        (29, -26, -11, 4.2),
        (26, -36, -3, 3.5),
        (20, -40, 4, 2.0),
    ],
    "callosum": [
        (0, 20, -4, 2),
        (0, 30, 2, 4),
        (0, 29, 12, 4.2),
        (0, 14, 24, 3),
        (0, -10, 28, 2.8),
        (0, -30, 23, 3),
        (0, -38, 13, 4.8),
    ],
    "brainstem": [
        (0, -20, -6, 11),
        (0, -22, -16, 11.5),
        (0, -22, -28, 13.5),
        (0, -27, -42, 9),
        (0, -34, -60, 7),
        (0, -38, -110, 6),
    ],
}

_HEMISPHERE = ((33.0, -17.0, 14.0), (36.0, 82.0, 56.0))  # centre and radii (mm) of the shell that carries the folds
_SPREAD = (1.0, 0.7, 0.85)  # how far each axis is projected: along y less, as a hemisphere is long
_BEND_WAVES, _BEND_PHASE = waves(generator("bends of the folds"), 8, 26.0, 60.0)
_BEND = 1.5 * torch.randn(8, 3, generator=generator("size of the bends"), dtype=torch.float64)


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def ellipsoid(points: Tensor, centre: tuple[float, ...], radii: tuple[float, ...]) -> Tensor:
    """``k (k − 1) / |(x − c) / r²|`` with ``k = |(x − c) / r|``: exact on the surface, to first order beside it."""
    scaled = (points - _column(centre, points)) / _column(radii, points)
    ratio, slope = scaled.square().sum(0).sqrt(), (scaled / _column(radii, points)).square().sum(0).sqrt()
    return (ratio - 1) * (ratio + 1e-6) / (slope + 1e-6 / min(radii))


def smooth_min(first: Tensor, second: Tensor, width: float) -> Tensor:
    """The minimum, rounded where the two are closer than ``width`` mm."""
    near = (width - (first - second).abs()).clamp_min(0)
    return torch.minimum(first, second) - near.square() / (4 * width)


def tube(points: Tensor, name: str, blend: float = 2.0) -> Tensor:
    """A chain of cones around the polyline ``TUBES[name]``, smoothly joined."""
    distance = torch.full_like(points[0], 1e3)
    knots = TUBES[name]
    for first, last in itertools.pairwise(knots):
        start, along = _column(first[:3], points), _column(last[:3], points) - _column(first[:3], points)
        offset = points - start
        share = ((offset * along).sum(0) / along.square().sum()).clamp(0, 1)
        radius = first[3] + share * (last[3] - first[3])
        distance = smooth_min(distance, (offset - share * along).square().sum(0).sqrt() - radius, blend)
    return distance


def mirrored(points: Tensor) -> Tensor:
    """The points at ``|x|``: both sides are asked for on the right."""
    return torch.cat([points[:1].abs(), points[1:]])


def cerebrum(points: Tensor) -> Tensor:
    """The hull of both hemispheres, sulci closed."""
    x, y, z = points = mirrored(points)
    egg = torch.stack([x * (1 + 0.0009 * (y + 17)), y, z])
    bulk = ellipsoid(egg, (0, -17, 14), (66, 81, 59))
    tent = 8 * torch.exp(-((x / 24) ** 2) - ((y + 48) / 26) ** 2)  # the occipital lobes leave room for the vermis
    base = (-15 + tent - 5 * torch.exp(-(((y + 75) / 25) ** 2))) - z
    bulk = -smooth_min(-bulk, -base, 14)
    lobe = torch.stack([x, y, z - 0.20 * (-10 - y) + 0.004 * (x - 42).square()])
    return smooth_min(bulk, ellipsoid(lobe, (43, -12, -20), (21, 41, 18)), 5)


def cerebellum(points: Tensor, hull: Tensor) -> Tensor:
    """Both halves and the vermis, 2 mm off the cerebrum's ``hull``."""
    halves = ellipsoid(mirrored(points), (22, -61, -30), (29, 30, 24))
    whole = smooth_min(halves, ellipsoid(points, (0, -57, -25), (12, 24, 22)), 8)
    return torch.maximum(whole, 2.0 - hull)


def slit(sheet: Tensor, outside: Tensor, half_width: float | Tensor) -> Tensor:
    """Distance to the wall of a thin sheet that ends where ``outside`` becomes positive."""
    return (sheet.square() + outside.clamp_min(0).square()).sqrt() - half_width


def folds(subject: PhantomSubject, points: Tensor, depth: Tensor) -> Tensor:
    """Distance to the wall of the nearest sulcus."""
    centre, radii = (_column(values, points) for values in _HEMISPHERE)
    offset = mirrored(points) - centre
    scaled = offset / radii
    radius = scaled.square().sum(0).sqrt().clamp_min(0.15)
    bends, bend_phase = _BEND_WAVES.to(points.dtype), _BEND_PHASE.to(points.dtype)
    bend, amount = bends @ points + bend_phase[:, None], _BEND.to(points.dtype)
    stretch = radius ** -_column(_SPREAD, points)
    shell = offset * stretch + amount.T @ bend.sin()
    vectors, phases = FOLD_WAVES.to(points.dtype), subject.fold_phase.to(points.dtype)
    side = (points[0] > 0).long()
    angle = vectors @ shell + phases.T[:, side]
    field, slope = angle.cos().sum(0), -(vectors.T @ angle.sin())
    bent = bends.T @ (bend.cos() * (amount @ slope))
    along = (_column(_SPREAD, points) * offset * stretch * slope).sum(0)
    slope = slope * stretch - scaled / radii * (along / radius.square()) + bent
    typical = math.sqrt(len(vectors)) * 2 * math.pi / 23
    sheet = field.abs() / (slope.square().sum(0) + (0.35 * typical) ** 2).sqrt()
    # Slow waves of the same kind make some sulci shallow, so that gyri join around their ends.
    slow = (vectors[:8] @ shell * 0.45 + phases.T[8:16, side]).cos().sum(0) / 2
    deepest = subject.depth * (0.72 + 0.28 * slow.clamp(-1.6, 1))
    return slit(sheet, depth - deepest, subject.sulcus)


def sylvian(points: Tensor) -> Tensor:
    """Distance to the wall of the fissure between the temporal lobe and the rest, with the insula at its end."""
    x, y, z = mirrored(points)
    rise = z - (-9 - 0.36 * (y - 18).clamp(max=0) - 0.15 * (y - 18).clamp(min=0)) + 1.6 * torch.sin(x / 5 + y / 11)
    ends = torch.maximum(y - 30, -44 - y).clamp_min(0)
    opening = slit(rise / 1.05, (36 - x).clamp_min(0) + ends, 0.8)
    insula = slit(
        x - 38 + 0.004 * (y + 3).square() + 0.025 * (rise - 7).square(),
        torch.maximum((rise - 7).abs() - 10, (y + 3).abs() - 22),
        0.8,
    )
    return torch.minimum(opening, insula)
