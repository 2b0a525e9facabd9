"""Subjects made from label maps: their shape, their ageing, and where everything lies at any time.

A frame point ``x`` (mm, RAS+) of a subject, t years after its first visit, shows what the map has at

    X = ψ_t(S(x)),        ψ_t(X) = X + Σ_k α_k(t) w_k(X),        α(t) = M⁻¹ r t.

``S`` is the subject's own shape: the identity for the first subject of a map, which keeps the map's anatomy, and for
further ones a random affine and a smooth warp. ``w`` are the two fields of the map (see `label_map_anatomy`), ``M`` its
response and ``r`` the subject's own yearly rates, so that lateral ventricles and cortex start to change by r per year.
Material moves between times s and t by ``S⁻¹ ∘ ψ_t⁻¹ ∘ ψ_s ∘ S``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lssl.synthetic.label_map_anatomy import AGEING, LabelMap, classes, read_map
from lssl.synthetic.label_map_cells import Cells
from lssl.synthetic.phantom_subject import generator, uniform, waves

__all__ = ["LONGEST", "MapSubject", "canonical", "draw_subject", "locate", "volumes"]

LONGEST = 6.0
"""Years for which the deformation is known to be invertible, at the largest rates (tested on the maps we have)."""

_WAVES, _HEIGHT = 12, 0.9  # number of waves; standard deviation of each one's amplitude per axis in mm


@dataclass(frozen=True, eq=False)  # equal only to itself, so that it can key a cache
class MapSubject:
    """One subject's constants.

    Attributes:
        anatomy: its label map.
        age: years at the first visit.
        rates: change of the logarithm of the volumes of "ventricles" and "cortex" per year, at the first visit.
        linear: ``(3, 3)`` frame → map frame.
        warp: wave vectors ``(M, 3)``, phases ``(M,)`` and amplitudes ``(M, 3)`` in mm of the smooth warp; M may be 0.
    """

    anatomy: LabelMap
    age: float
    rates: Mapping[str, float]
    linear: Tensor
    warp: tuple[Tensor, Tensor, Tensor]


@functools.lru_cache(maxsize=4096)
def draw_subject(path: Path, seed: int, index: int, own_shape: bool) -> MapSubject:
    """The subject ``index`` of the population ``seed``.

    Args:
        path: of its label map.
        seed: of the population.
        index: of the subject.
        own_shape: bends the map's anatomy; else the subject has it as it is.
    """
    stream = generator("label map subject", seed, index)
    severity = uniform(stream, 0, 1)
    rates = {
        "ventricles": 0.015 + 0.040 * severity + uniform(stream, 0, 0.010),
        "cortex": -(0.003 + 0.006 * severity + uniform(stream, 0, 0.002)),
    }
    age, linear, count = uniform(stream, 55, 80), torch.eye(3, dtype=torch.float64), 0
    if own_shape:
        angles = math.radians(7) * (2 * torch.rand(3, generator=stream, dtype=torch.float64) - 1)
        x, y, z = angles.tolist()
        turn = torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64))
        linear, count = turn / (1 + 0.08 * (2 * torch.rand(3, generator=stream, dtype=torch.float64) - 1)), _WAVES
    vectors, phases = waves(stream, count, 70, 140)
    heights = _HEIGHT * torch.randn(count, 3, generator=stream, dtype=torch.float64).clamp(-2, 2)
    return MapSubject(read_map(path), age, rates, linear, (vectors, phases, heights))


def canonical(subject: MapSubject, points: Tensor, time: float = 0.0) -> Tensor:
    """Map frame positions ``ψ_t(S(x))`` of frame points ``(N, 3)`` in mm, ``time`` years after the first visit."""
    return subject.anatomy.pull(_shape(subject, points), _amplitudes(subject, time))


def locate(subject: MapSubject, points: Tensor, time: float = 0.0, tolerance: float = 1e-7) -> Tensor:
    """Frame points ``(N, 3)`` in mm that show map frame positions, the inverse of :func:`canonical`, in float64.

    By a fixed-point iteration, to ``tolerance`` mm: the warp and the ageing are mild, so it contracts.
    """
    points, inverse = points.double(), torch.linalg.inv(subject.linear)
    found = points @ inverse.T
    for _ in range(200):
        miss = points - canonical(subject, found, time)
        found = found + miss @ inverse.T
        if miss.abs().max() < tolerance:
            break
    return found


def volumes(subject: MapSubject, time: float, lateral: bool) -> dict[int, float]:
    """Volume of each class in mm³ at ``time`` years: of the map's voxels, whose corners have moved to where they show.

    Free of the error with which the voxels of a visit are counted. It takes seconds.
    """
    anatomy = subject.anatomy
    of_voxel = classes(anatomy.numbers, lateral)[anatomy.code.long()]
    cells = Cells(of_voxel > 0, anatomy.affine)
    volume = cells.volumes(locate(subject, cells.corners, time, tolerance=1e-4))
    total = torch.zeros(int(of_voxel.max()) + 1, dtype=torch.float64)
    total.index_add_(0, of_voxel[of_voxel > 0].long(), volume)
    return {name: value for name, value in enumerate(total.tolist()) if name}


def _shape(subject: MapSubject, points: Tensor) -> Tensor:
    """``S``: frame → map frame."""
    vectors, phases, heights = (part.to(points.dtype) for part in subject.warp)
    moved = points @ subject.linear.to(points.dtype).T
    return moved + (points @ vectors.T + phases).sin() @ heights if len(phases) else moved


def _amplitudes(subject: MapSubject, time: float) -> Tensor:
    """``α(t) (2,)`` in mm."""
    rates = torch.tensor([subject.rates[name] for name in AGEING], dtype=torch.float64)
    return torch.linalg.solve(subject.anatomy.response, rates * time)
