"""The phantom's anatomy: what lies at a canonical point, painted tissue over tissue from the shapes.

**Partial volume.** A layer covers ``clip(1/2 − d/h, 0, 1)`` of a voxel of width ``h`` whose centre is ``d`` outside,
and a thin sheet of half width ``w`` covers the overlap of ``[s − h/2, s + h/2]`` with ``[−w, w]``. Layers are painted
one over the other; a voxel's label is the last structure to cover more than half of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lssl.synthetic import phantom_shapes as shapes
from lssl.synthetic.phantom_shapes import cerebrum, ellipsoid, mirrored, slit, smooth_min, tube
from lssl.synthetic.phantom_subject import PhantomSubject

__all__ = ["STRUCTURES", "paint"]

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
    cerebellum = shapes.cerebellum(points, hull)
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
    below = mirrored(points[:, where])
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
    fissure = slit(points[0], -core, 0.8)
    sylvian = shapes.sylvian(points)
    depth = torch.minimum(-hull, fissure)
    folds = shapes.folds(subject, points, depth)
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
    deep = slit(torch.sin(angle * 6).abs() / 6 * reach, torch.maximum(-cerebellum - 13, 16 - reach), 0.45)
    shallow = slit(torch.sin(angle * 18 + 1).abs() / 18 * reach, torch.maximum(-cerebellum - 6, 23 - reach), 0.35)
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
    mirrored = shapes.mirrored(points)
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
