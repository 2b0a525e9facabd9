"""The phantom's anatomy: what lies where, as implicit functions of continuous canonical millimetres.

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

**Partial volume.** A layer covers ``clip(1/2 − d/h, 0, 1)`` of a voxel of width ``h`` whose centre is ``d`` outside,
and a thin sheet of half width ``w`` covers the overlap of ``[s − h/2, s + h/2]`` with ``[−w, w]``. Layers are painted
one over the other; a voxel's label is the last structure to cover more than half of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lssl.synthetic.phantom_subject import FOLD_WAVES, PhantomSubject, generator, waves

__all__ = ["STRUCTURES", "TUBES", "cerebrum", "paint"]

STRUCTURES: dict[int, str] = {
    2: "left cerebral white matter",
    3: "left cerebral cortex",
    4: "left lateral ventricle",
    7: "left cerebellar white matter",
    8: "left cerebellar cortex",
    10: "left thalamus",
    11: "left caudate",
    12: "left putamen",
    13: "left pallidum",
    14: "third ventricle",
    15: "fourth ventricle",
    16: "brainstem",
    17: "left hippocampus",
    18: "left amygdala",
    24: "cerebrospinal fluid",
    41: "right cerebral white matter",
    42: "right cerebral cortex",
    43: "right lateral ventricle",
    46: "right cerebellar white matter",
    47: "right cerebellar cortex",
    49: "right thalamus",
    50: "right caudate",
    51: "right putamen",
    52: "right pallidum",
    53: "right hippocampus",
    54: "right amygdala",
}
"""FreeSurfer's numbers; 0 is air and the head outside the dura."""

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
_FACE: list[tuple[str, tuple[float, float, float], tuple[float, float, float]]] = [
    ("fat", (32, 54, -30), (17, 22, 16)),  # orbit
    ("csf", (32, 62, -30), (12, 12, 12)),  # eye
    ("air", (15, 50, -62), (9, 18, 12)),  # maxillary sinus
    ("air", (0, 30, -40), (9, 12, 8)),  # sphenoid sinus
    ("bone", (0, 40, -84), (38, 22, 8)),  # teeth and jaw
    ("fat", (50, 12, -62), (7, 26, 34)),  # cheek
    ("fat", (0, -92, -88), (30, 8, 40)),  # nape
    ("bone", (0, -16, -98), (17, 15, 45)),  # spine
    ("marrow", (0, -14, -78), (11, 9, 9)),
    ("marrow", (0, -14, -98), (11, 9, 9)),
]
_SPREAD = (1.0, 0.7, 0.85)  # how far each axis is projected: along y less, as a hemisphere is long
_BEND_WAVES, _BEND_PHASE = waves(generator("bends of the folds"), 8, 26.0, 60.0)
_BEND = 1.5 * torch.randn(8, 3, generator=generator("size of the bends"), dtype=torch.float64)


# --- implicit functions; points are (3, N), distances (N,) ------------------------------------------------------------


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


def _mirrored(points: Tensor) -> Tensor:
    return torch.cat([points[:1].abs(), points[1:]])


def cerebrum(points: Tensor) -> Tensor:
    """The hull of both hemispheres, sulci closed."""
    x, y, z = points = _mirrored(points)
    egg = torch.stack([x * (1 + 0.0009 * (y + 17)), y, z])
    bulk = ellipsoid(egg, (0, -17, 14), (66, 81, 59))
    tent = 8 * torch.exp(-((x / 24) ** 2) - ((y + 48) / 26) ** 2)  # the occipital lobes leave room for the vermis
    base = (-15 + tent - 5 * torch.exp(-(((y + 75) / 25) ** 2))) - z
    bulk = -smooth_min(-bulk, -base, 14)
    lobe = torch.stack([x, y, z - 0.20 * (-10 - y) + 0.004 * (x - 42).square()])
    return smooth_min(bulk, ellipsoid(lobe, (43, -12, -20), (21, 41, 18)), 5)


def _cerebellum(points: Tensor, hull: Tensor) -> Tensor:
    halves = ellipsoid(_mirrored(points), (22, -61, -30), (29, 30, 24))
    whole = smooth_min(halves, ellipsoid(points, (0, -57, -25), (12, 24, 22)), 8)
    return torch.maximum(whole, 2.0 - hull)


def _slit(sheet: Tensor, outside: Tensor, half_width: float | Tensor) -> Tensor:
    """Distance to the wall of a thin sheet that ends where ``outside`` becomes positive."""
    return (sheet.square() + outside.clamp_min(0).square()).sqrt() - half_width


def _folds(subject: PhantomSubject, points: Tensor, depth: Tensor) -> Tensor:
    """Distance to the wall of the nearest sulcus."""
    centre, radii = (_column(values, points) for values in _HEMISPHERE)
    offset = _mirrored(points) - centre
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
    return _slit(sheet, depth - deepest, subject.sulcus)


def _sylvian(points: Tensor) -> Tensor:
    """Distance to the wall of the fissure between the temporal lobe and the rest, with the insula at its end."""
    x, y, z = _mirrored(points)
    rise = z - (-9 - 0.36 * (y - 18).clamp(max=0) - 0.15 * (y - 18).clamp(min=0)) + 1.6 * torch.sin(x / 5 + y / 11)
    ends = torch.maximum(y - 30, -44 - y).clamp_min(0)
    opening = _slit(rise / 1.05, (36 - x).clamp_min(0) + ends, 0.8)
    insula = _slit(
        x - 38 + 0.004 * (y + 3).square() + 0.025 * (rise - 7).square(),
        torch.maximum((rise - 7).abs() - 10, (y + 3).abs() - 22),
        0.8,
    )
    return torch.minimum(opening, insula)


# --- painting ---------------------------------------------------------------------------------------------------------


class _Canvas:
    """Brightness and label of N points, painted layer over layer."""

    def __init__(self, points: Tensor, width: float, tissue: Mapping[str, float]) -> None:
        self.points, self.width, self.tissue = points, max(width, 1e-6), tissue
        self.value = points.new_zeros(points.shape[1])
        self.label = torch.zeros(points.shape[1], dtype=torch.int16, device=points.device)
        self.right = points[0] > 0

    def cover(self, distance: Tensor) -> Tensor:
        """The share of a voxel that lies inside."""
        return (0.5 - distance / self.width).clamp(0, 1)

    def cover_sheet(self, distance: Tensor, half_width: float) -> Tensor:
        """The share of a voxel that lies inside a thin sheet, whose wall is at ``distance``."""
        return self.cover(distance) - self.cover(distance + 2 * half_width)

    def layer(self, cover: Tensor, tissue: str, label: int | tuple[int, int], where: Tensor | None = None) -> None:
        """Paints one tissue; a pair of labels is left and right; ``where`` are the indices that ``cover`` is about."""
        left, right = (label, label) if isinstance(label, int) else label
        value, name, side = (part if where is None else part[where] for part in (self.value, self.label, self.right))
        value = value.lerp(torch.full_like(value, self.tissue.get(tissue, 0.0)), cover)
        name = torch.where(cover > 0.5, torch.where(side, right, left).to(torch.int16), name)
        if where is None:
            self.value, self.label = value, name
        else:
            self.value[where], self.label[where] = value, name


def paint(
    subject: PhantomSubject, points: Tensor, width: float = 0.0, tissue: Mapping[str, float] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What lies at canonical points.

    Args:
        subject: whose head.
        points: ``(3, N)`` canonical mm.
        width: of a voxel in mm, for the partial volume; 0 for the points themselves.
        tissue: brightness of the tissues that `phantom_image.TISSUE` lists; nothing where only labels matter.

    Returns:
        Brightness ``(N,)``, label ``(N,)`` int16, and whether a point lies in the head ``(N,)`` bool.
    """
    canvas = _Canvas(points, width, tissue or {})
    hull = cerebrum(points)
    cerebellum = _cerebellum(points, hull)
    stem = tube(points, "brainstem")
    head = _paint_head(canvas, subject, hull, cerebellum, stem)
    inner = smooth_min(smooth_min(hull, cerebellum, 14), stem, 10) - subject.layers[0]
    canvas.layer(canvas.cover(torch.maximum(inner, -78 - points[2])), "csf", 24)
    where = (hull < width).nonzero().squeeze(1)
    _paint_cerebrum(canvas, subject, where, hull[where])
    where = (torch.minimum(cerebellum, stem) < width).nonzero().squeeze(1)
    _paint_hindbrain(canvas, where, cerebellum[where], stem[where])
    x, y, z = points
    where = ((x.abs() < 46) & (y > -76) & (y < 44) & (z > -36) & (z < 38)).nonzero().squeeze(1)
    _paint_deep(canvas, subject, where)
    return canvas.value, canvas.label, head < 0


def _paint_head(canvas: _Canvas, subject: PhantomSubject, hull: Tensor, cerebellum: Tensor, stem: Tensor) -> Tensor:
    """Scalp, skull, face and neck; returns the head's outer surface."""
    fluid, bone, scalp = subject.layers
    x, y, z = points = canvas.points
    skull = torch.maximum(smooth_min(smooth_min(hull, cerebellum, 24), stem, 12) - fluid, -70 - z)
    neck = torch.maximum((x.square() + (y + 35).square()).sqrt() - 52, z + 30)
    face = smooth_min(ellipsoid(points, (0, 30, -52), (55, 44, 62)), ellipsoid(points, (0, 72, -62), (13, 18, 22)), 12)
    head = smooth_min(smooth_min(skull - bone - scalp, face, 22), neck, 18)
    canvas.layer(canvas.cover(head), "muscle", 0)
    canvas.layer(canvas.cover((head + 3.2).abs() - 1.9), "fat", 0)
    where = ((z < 0) & (skull > 0) & (head < 0)).nonzero().squeeze(1)
    below = _mirrored(points[:, where])
    for name, centre, radii in _FACE:
        shape = torch.maximum(ellipsoid(below, centre, radii), head[where] + 2)
        canvas.layer(canvas.cover(shape), name, 0, where)
    canvas.layer(canvas.cover(torch.maximum(skull - bone, head + 3)), "bone", 0)
    canvas.layer(canvas.cover(torch.maximum((skull - bone / 2).abs() - bone / 6, -5 - z)), "marrow", 0)
    clivus = torch.maximum(ellipsoid(below, (0, -4, -40), (9, 10, 14)), 2 - skull[where])
    canvas.layer(canvas.cover(clivus), "marrow", 0, where)
    return head


def _paint_cerebrum(canvas: _Canvas, subject: PhantomSubject, where: Tensor, hull: Tensor) -> None:
    points = canvas.points[:, where]
    core = ellipsoid(points, (0, -5, 3), (34, 37, 27))
    fissure = _slit(points[0], -core, 0.8)
    sylvian = _sylvian(points)
    depth = torch.minimum(-hull, fissure)
    folds = _folds(subject, points, depth)
    pia = smooth_min(smooth_min(smooth_min(-hull, folds, 2.5), fissure, 2), sylvian, 2)
    inside = canvas.cover(hull)
    canvas.layer(inside, "cortex", (3, 42), where)
    canvas.layer(canvas.cover(subject.thickness - pia), "white", (2, 41), where)
    for wall, half_width in ((folds, subject.sulcus), (fissure, 0.8), (sylvian, 0.8)):
        canvas.layer(inside * canvas.cover_sheet(wall, half_width), "csf", 24, where)


def _paint_hindbrain(canvas: _Canvas, where: Tensor, cerebellum: Tensor, stem: Tensor) -> None:
    points = canvas.points[:, where]
    x, y, z = points
    angle = torch.atan2(z + 30, -(y + 40)) + 0.010 * x.abs() + 0.05 * torch.sin(x / 7 + y / 9) + 0.04 * torch.sin(z / 5)
    reach = ((z + 30).square() + (y + 40).square()).sqrt()
    # They end before they meet at the axis.
    deep = _slit(torch.sin(angle * 6).abs() / 6 * reach, torch.maximum(-cerebellum - 13, 16 - reach), 0.45)
    shallow = _slit(torch.sin(angle * 18 + 1).abs() / 18 * reach, torch.maximum(-cerebellum - 6, 23 - reach), 0.35)
    folia = smooth_min(deep, shallow, 1)
    pia = smooth_min(-cerebellum, folia, 1.5)
    inside = canvas.cover(cerebellum)
    canvas.layer(inside, "cortex", (8, 47), where)
    canvas.layer(canvas.cover(torch.maximum(1.7 - pia, cerebellum)), "white", (7, 46), where)
    canvas.layer(inside * canvas.cover_sheet(folia, 0.4), "csf", 24, where)
    canvas.layer(canvas.cover(torch.maximum(stem, z + 4)), "stem", 16, where)
    canvas.layer(canvas.cover(ellipsoid(points, (0, -40, -32), (6, 4.5, 10))), "csf", 15, where)


def _paint_deep(canvas: _Canvas, subject: PhantomSubject, where: Tensor) -> None:
    """The nuclei and ventricles."""
    points = canvas.points[:, where]
    mirrored = _mirrored(points)
    right = canvas.right[where]
    x, y, _ = mirrored

    def structure(name: str, distance: Tensor, tissue: str, label: int) -> None:
        left, other = subject.growth[name]
        distance = distance - torch.where(right, other, left).to(distance.dtype)
        distance = torch.maximum(distance, 0.9 - x)  # keeps the two sides apart: the septum
        twin = label + (36 if label > 14 else 39)
        canvas.layer(canvas.cover(distance), tissue, (label, twin), where)

    canvas.layer(canvas.cover(ellipsoid(mirrored, (0, -8, 0), (24, 26, 19))), "white", (2, 41), where)
    canvas.layer(canvas.cover(ellipsoid(mirrored, (0, 4, -19), (11, 10, 7))), "csf", 24, where)
    canvas.layer(
        canvas.cover(tube(torch.cat([0.22 * mirrored[:1], mirrored[1:]]), "callosum")), "white", (2, 41), where
    )
    tilted = torch.cat([x[None] + 0.22 * (y + 20), mirrored[1:]])
    structure("thalamus", ellipsoid(tilted, (11.8, -18, 7), (9.5, 15, 9.5)), "thalamus", 10)
    lens = torch.cat([x[None] + 0.25 * (y - 2) + 0.0036 * (y - 2).square(), mirrored[1:]])
    structure("putamen", ellipsoid(lens, (27, 2, 1), (5.8, 16, 10)), "deep", 12)
    structure("pallidum", ellipsoid(lens, (19.8, -2, -0.5), (4.6, 10.5, 6.8)), "pallidum", 13)
    structure("amygdala", ellipsoid(mirrored, (23, 0, -19), (7, 7, 7)), "cortex", 18)
    horns = torch.minimum(tube(mirrored, "temporal horn"), tube(mirrored, "occipital horn"))
    structure("ventricle", smooth_min(tube(mirrored, "ventricle", 4), horns, 3), "csf", 4)
    structure("hippocampus", tube(mirrored, "hippocampus"), "cortex", 17)
    structure("caudate", tube(mirrored, "caudate"), "deep", 11)
    wide = max(0.0, 0.5 * sum(subject.growth["ventricle"]))
    canvas.layer(canvas.cover(ellipsoid(mirrored, (0, -14, 1), (1.6 + 0.35 * wide, 13, 10))), "csf", 14, where)
