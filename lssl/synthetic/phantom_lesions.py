"""The phantom's white-matter lesions: where they lie, which appear, grow or vanish, and what a visit shows as changed.

A lesion is a ball about a canonical point, so that it moves with the anatomy, ages with it and is misregistered with
it. It is dark in a T1-weighted image and ends where white matter ends. This is no claim about any disease.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lssl.synthetic.draws import uniform
from lssl.synthetic.phantom_anatomy import paint
from lssl.synthetic.phantom_subject import PhantomSubject, generator

__all__ = ["CHANGES", "Lesion", "change_labels", "draw_lesions", "paint_lesions"]

CHANGES: dict[int, str] = {1: "new", 2: "grown", 3: "vanished", 4: "stable"}
"""Labels of change since the previous visit: of a lesion that was not there, of what a known lesion has added, of what
was lesion and is none any more, of what is lesion in both visits."""

_FATES = ("new", "stable", "grown", "vanished")
_WHITE = (2, 41)
_MARGIN, _APART = 4.0, 14.0  # mm of white matter around a centre, and between centres
_MOST_GROWTH = 4.5  # mm


@dataclass(frozen=True)
class Lesion:
    """One lesion.

    Attributes:
        centre: canonical mm.
        radius: mm, when it is first seen.
        growth: mm per visit, to its radius.
        first: number of the visit that shows it first.
        gone: number of the first visit that shows it no more; ``None`` if it stays.
    """

    centre: tuple[float, float, float]
    radius: float
    growth: float = 0.0
    first: int = 0
    gone: int | None = None

    def radius_at(self, visit: int) -> float:
        """Its radius in mm; 0 if the visit does not show it."""
        if visit < self.first or (self.gone is not None and visit >= self.gone):
            return 0.0
        return self.radius + min(_MOST_GROWTH, self.growth * (visit - self.first))


@functools.lru_cache(maxsize=4096)
def draw_lesions(subject: PhantomSubject, seed: int, index: int, number: int, visits: int) -> tuple[Lesion, ...]:
    """The lesions of a subject, in white matter; those of every fourth subject stay as they are.

    Of the others, lesions appear, stay, grow and vanish in turn, from a random beginning.

    Args:
        subject: whose head.
        seed: of the population.
        index: of the subject.
        number: of lesions; fewer if no more places are found.
        visits: of the subject.
    """
    stream = generator("lesions", seed, index)
    offset = int(torch.randint(len(_FATES), (1,), generator=stream))
    lesions: list[Lesion] = []
    for place in _places(subject, stream, number):
        fate = _FATES[(len(lesions) + offset) % len(_FATES)] if index % 4 != 3 and visits > 1 else "stable"
        radius, growth = uniform(stream, 3.0, 4.5), uniform(stream, 1.0, 1.5)
        visit = int(torch.randint(1, max(2, visits), (1,), generator=stream))
        lesions.append(
            Lesion(
                centre=place,
                radius=radius,
                growth=growth if fate == "grown" else 0.0,
                first=visit if fate == "new" else 0,
                gone=visit if fate == "vanished" else None,
            )
        )
    return tuple(lesions)


def _places(subject: PhantomSubject, stream: torch.Generator, number: int) -> list[tuple[float, float, float]]:
    """Canonical points that lie deep enough in white matter, and apart."""
    low, high = torch.tensor([-55.0, -75.0, -10.0]), torch.tensor([55.0, 45.0, 55.0])
    points = low + (high - low) * torch.rand(4000, 3, generator=stream)
    around = torch.cat([torch.zeros(1, 3), _MARGIN * torch.eye(3), -_MARGIN * torch.eye(3)])
    label = paint(subject, (points[:, None] + around).reshape(-1, 3).T)[1].view(-1, len(around))
    inside = points[torch.isin(label, torch.tensor(_WHITE, dtype=label.dtype)).all(1)]
    chosen: list[Tensor] = []
    for point in inside:
        if len(chosen) == number:
            break
        if all(float((point - other).norm()) >= _APART for other in chosen):
            chosen.append(point)
    return [(float(x), float(y), float(z)) for x, y, z in chosen]


def paint_lesions(
    value: Tensor, label: Tensor, points: Tensor, width: float, lesions: tuple[Lesion, ...], visit: int, tissue: float
) -> Tensor:
    """Brightness ``(N,)`` with the lesions of a visit.

    Args:
        value: ``(N,)`` brightness without them.
        label: ``(N,)`` anatomy.
        points: ``(3, N)`` canonical mm.
        width: of a voxel in mm, for the partial volume.
        lesions: of the subject.
        visit: its number.
        tissue: brightness of a lesion.
    """
    white = _white(label)
    for lesion in lesions:
        if radius := lesion.radius_at(visit):
            cover = (0.5 - (_distance(points, lesion) - radius) / width).clamp(0, 1) * white
            value = value.lerp(torch.full_like(value, tissue), cover)
    return value


def change_labels(label: Tensor, points: Tensor, lesions: tuple[Lesion, ...], visit: int) -> Tensor:
    """``(N,)`` int16, :data:`CHANGES` since the previous visit at canonical points ``(3, N)``; 0 elsewhere."""
    white, change = _white(label), torch.zeros_like(label)
    for lesion in lesions:
        distance, before = _distance(points, lesion), lesion.radius_at(visit - 1)
        was, now = (distance < before) & white, (distance < lesion.radius_at(visit)) & white
        change[now & ~was] = 2 if before else 1
        change[was & ~now] = 3
        change[was & now] = 4
    return change


def _white(label: Tensor) -> Tensor:
    return torch.isin(label, torch.tensor(_WHITE, dtype=label.dtype))


def _distance(points: Tensor, lesion: Lesion) -> Tensor:
    return (points - torch.tensor(lesion.centre, dtype=points.dtype)[:, None]).norm(dim=0)
