"""Subjects made from label maps: their shape, their ageing, and where everything lies at any time.

A frame point ``x`` (mm, RAS+) of a subject, t years after its first visit, shows what the map has at

    X = ψ_t(S(x)),        ψ_t(X) = X + Σ_k α_k(t) w_k(X),        α(t) = M⁻¹ r t.

``S`` is the subject's own shape: the identity for the first subject of a map, which keeps the map's anatomy, and for
further ones a random affine and a smooth warp. ``w`` are the fields of the map (see `label_map_anatomy`), ``M`` its
response and ``r`` the subject's own yearly rates, so that the structures of `AGEING` start to change by r per year.
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

from lssl.synthetic.draws import uniform
from lssl.synthetic.label_map_anatomy import AGEING, STRUCTURES, LabelMap, classes, read_map
from lssl.synthetic.label_map_cells import Cells
from lssl.synthetic.phantom_subject import generator, waves

__all__ = [
    "LONGEST",
    "LONGEST_FAST",
    "RATES",
    "MapSubject",
    "canonical",
    "draw_subject",
    "locate",
    "structure_rates",
    "volumes",
]

LONGEST, LONGEST_FAST = 6.0, 4.0
"""Years for which the deformation is known to be invertible, at the largest rates (tested on the maps we have): of an
ordinary and of a fast subject."""

RATES: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "lateral ventricle": ((0.015, 0.040, 0.010), (0.080, 0.015, 0.005)),
    "cortex": ((-0.003, -0.006, -0.002), (-0.011, -0.003, -0.001)),
    "hippocampus and amygdala": ((-0.005, -0.010, -0.005), (-0.040, -0.008, -0.002)),
    "thalamus": ((-0.002, -0.004, -0.002), (-0.006, -0.004, -0.002)),
    "caudate": ((-0.002, -0.004, -0.002), (-0.005, -0.003, -0.002)),
    "lentiform": ((-0.002, -0.004, -0.002), (-0.005, -0.003, -0.002)),
}
"""Yearly rates, of an ordinary and of a fast subject: (first, with severity, at random), the last two times a draw from
0 to 1. One severity serves all structures of a subject.

Ordinary, of healthy people from 60 on: lateral ventricles +4.4 %, hippocampus −0.84 %, amygdala −0.81 %, cortex about
−0.5 % a year (Fjell et al., J Neurosci 2009); hippocampus −1.41 % in a meta-analysis of controls, and −4.66 % in
Alzheimer's disease (Barnes et al., Neurobiol Aging 2009), which the fast subjects follow."""

_WAVES, _HEIGHT = 12, 0.9  # number of waves; standard deviation of each one's amplitude per axis in mm


@dataclass(frozen=True, eq=False)  # equal only to itself, so that it can key a cache
class MapSubject:
    """One subject's constants.

    Attributes:
        anatomy: its label map.
        age: years at the first visit.
        rates: change of the logarithm of the volumes of `AGEING` per year, at the first visit.
        linear: ``(3, 3)`` frame → map frame.
        warp: wave vectors ``(M, 3)``, phases ``(M,)`` and amplitudes ``(M, 3)`` in mm of the smooth warp; M may be 0.
    """

    anatomy: LabelMap
    age: float
    rates: Mapping[str, float]
    linear: Tensor
    warp: tuple[Tensor, Tensor, Tensor]


@functools.lru_cache(maxsize=4096)
def draw_subject(path: Path, seed: int, index: int, own_shape: bool, fast: bool = False) -> MapSubject:
    """The subject ``index`` of the population ``seed``.

    Args:
        path: of its label map.
        seed: of the population.
        index: of the subject.
        own_shape: bends the map's anatomy; else the subject has it as it is.
        fast: ages as in Alzheimer's disease.
    """
    stream = generator("label map subject", seed, index)
    severity = uniform(stream, 0, 1)
    chance = [uniform(stream, 0, 1) for _ in range(2)]
    age, linear, count = uniform(stream, 55, 80), torch.eye(3, dtype=torch.float64), 0
    if own_shape:
        angles = math.radians(7) * (2 * torch.rand(3, generator=stream, dtype=torch.float64) - 1)
        x, y, z = angles.tolist()
        turn = torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64))
        linear, count = turn / (1 + 0.08 * (2 * torch.rand(3, generator=stream, dtype=torch.float64) - 1)), _WAVES
    vectors, phases = waves(stream, count, 70, 140)
    heights = _HEIGHT * torch.randn(count, 3, generator=stream, dtype=torch.float64).clamp(-2, 2)
    chance += [uniform(stream, 0, 1) for _ in range(len(RATES) - len(chance))]
    law = {name: RATES[name][fast] for name in RATES}
    rates = {name: a + b * severity + c * u for (name, (a, b, c)), u in zip(law.items(), chance, strict=True)}
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


def structure_rates(subject: MapSubject) -> dict[str, float]:
    """Change of the logarithm of the volume of every structure per year, at the first visit.

    Those of `AGEING` are the subject's own. The others follow from the same fields, ``E M⁻¹ r`` with E their effects.
    Volumes keep to them within a tenth, or 0.05 % a year, for two years; of a fast subject within 0.2 % a year for one.
    Later, thin structures accelerate: on a real map, on average over a fast subject's four years, ventricles 8.6 → 8.3
    % a year, hippocampus −4.4 → −4.5, cortex −1.2 → −1.6, caudate −0.7 → −1.3.
    """
    found = subject.anatomy.effects @ _amplitudes(subject, 1.0)
    return dict(zip(STRUCTURES, found.tolist(), strict=True))


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
    """``α(t) (K,)`` in mm."""
    rates = torch.tensor([subject.rates[name] for name in AGEING], dtype=torch.float64)
    return torch.linalg.solve(subject.anatomy.response, rates * time)
