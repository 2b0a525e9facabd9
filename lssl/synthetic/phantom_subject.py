"""What makes one phantom subject differ from another, drawn from (seed, subject) alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lssl.synthetic.draws import uniform
from lssl.utils.errors import InputError

__all__ = ["FASTEST", "FOLD_WAVES", "PhantomSubject", "Rates", "check_rates", "draw_subject", "generator", "waves"]

#: The fastest yearly rates for which the deformation is checked: a subject as in Alzheimer's disease.
FASTEST = {"ventricles": 0.10, "hippocampus": -0.05, "cortex": -0.015}
Rates = tuple[tuple[str, float], ...]

_VARYING = ("ventricle", "caudate", "putamen", "pallidum", "thalamus", "hippocampus", "amygdala")


@dataclass(frozen=True, eq=False)  # equal only to itself, so that it can key a cache
class PhantomSubject:
    """One subject's constants.

    Attributes:
        age: years at baseline.
        scale: ``(3,)`` head size, relative to the canonical head.
        warp: wave vectors ``(M, 3)``, phases ``(M,)`` and amplitudes ``(M, 3)`` in mm of the smooth shape warp.
        growth: mm added to a structure's surface, left and right.
        fold_phase: ``(2, M)`` phases of the folds, left and right.
        sulcus: half width in mm of the sulci.
        depth: mm that the deepest sulci reach below the hull.
        thickness: mm of cortex.
        layers: mm of subarachnoid CSF, bone and scalp.
        texture: wave vectors ``(M, 3)`` and phases ``(M,)`` of the tissue's inner pattern.
        tissue: the subject's own factor on each tissue's brightness.
        rates: change of the logarithm of the volumes of "ventricles", "hippocampus" and "cortex" per year.
        gradient: ``(3,)`` where the cortex ages faster than on average.
    """

    age: float
    scale: Tensor
    warp: tuple[Tensor, Tensor, Tensor]
    growth: Mapping[str, tuple[float, float]]
    fold_phase: Tensor
    sulcus: float
    depth: float
    thickness: float
    layers: tuple[float, float, float]
    texture: tuple[Tensor, Tensor]
    tissue: Mapping[str, float]
    rates: Mapping[str, float]
    gradient: Tensor


def generator(*key: object) -> torch.Generator:
    """A generator whose stream depends on the key alone, so no draw depends on what was asked for before."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def waves(stream: torch.Generator, count: int, shortest: float, longest: float) -> tuple[Tensor, Tensor]:
    """Random wave vectors ``(count, 3)`` with wavelengths within a range of mm, and their phases ``(count,)``."""
    direction = torch.randn(count, 3, generator=stream, dtype=torch.float64)
    length = shortest + (longest - shortest) * torch.rand(count, 1, generator=stream, dtype=torch.float64)
    phase = 2 * math.pi * torch.rand(count, generator=stream, dtype=torch.float64)
    return direction / direction.norm(dim=1, keepdim=True) * (2 * math.pi / length), phase


FOLD_WAVES, FOLD_PHASE = waves(generator("folds of the average brain"), 28, 19.0, 26.0)


def check_rates(group: str, rates: Mapping[str, float]) -> Rates:
    """Declared yearly rates of a group, refused if the phantom cannot age so.

    Args:
        group: its name.
        rates: structure → change of the logarithm of its volume per year.
    """
    for name, rate in rates.items():
        if name not in FASTEST:
            raise InputError(f"rate_groups: {group} has a rate of {name}; structures are {', '.join(FASTEST)}.")
        low, high = sorted((0.0, FASTEST[name]))
        if not low <= rate <= high:
            raise InputError(
                f"rate_groups: the rate of {name} of {group} is {rate:g} a year; give {low:g} to {high:g}."
            )
    return tuple(sorted(rates.items()))


def draw_subject(seed: int, index: int, fast: bool = False, rates: Rates = ()) -> PhantomSubject:
    """The subject ``index`` of the population ``seed``.

    Args:
        seed: of the population.
        index: of the subject.
        fast: ages as in Alzheimer's disease; nothing else differs.
        rates: declared ones replace those that are drawn; nothing else differs.
    """
    stream = generator("subject", seed, index)
    age = uniform(stream, 55, 80)
    old, severity = (age - 55) / 25, uniform(stream, 0, 1)
    size = uniform(stream, 0.92, 1.0)
    scale = size * (1 + 0.03 * (2 * torch.rand(3, generator=stream, dtype=torch.float64) - 1))
    vectors, phases = waves(stream, 8, 70, 160)
    growth = {}
    for name in _VARYING:
        both = uniform(stream, -0.5, 0.5)
        growth[name] = (both + uniform(stream, -0.2, 0.2), both + uniform(stream, -0.2, 0.2))
    wide = uniform(stream, -1.2, 0.8) + 1.8 * old
    growth["ventricle"] = (wide + uniform(stream, -0.1, 0.5), wide + uniform(stream, -0.4, 0.2))  # the left is larger
    jitter = 1.1 * torch.randn(2, len(FOLD_PHASE), generator=stream, dtype=torch.float64)
    return PhantomSubject(
        age=age,
        scale=scale,
        warp=(vectors, phases, 0.8 * torch.randn(8, 3, generator=stream, dtype=torch.float64)),
        growth=growth,
        fold_phase=FOLD_PHASE + jitter,
        sulcus=uniform(stream, 0.55, 0.8) + 0.35 * old,
        depth=uniform(stream, 18, 23),
        thickness=uniform(stream, 2.7, 3.2) - 0.2 * old,
        layers=(uniform(stream, 2.0, 2.6) + 0.6 * old, uniform(stream, 5, 7.5), uniform(stream, 4, 7)),
        texture=waves(stream, 16, 9, 30),
        tissue={
            name: uniform(stream, 0.97, 1.03) for name in ("white", "cortex", "deep", "csf", "fat", "muscle", "bone")
        },
        rates=_rates(severity, [uniform(stream, 0, end) for end in (0.010, 0.006, 0.002)], fast) | dict(rates),
        gradient=0.25 * torch.randn(3, generator=stream, dtype=torch.float64).clamp(-2, 2),
    )


def _rates(severity: float, chance: list[float], fast: bool) -> dict[str, float]:
    """Yearly rates: of healthy ageing, or of Alzheimer's disease (see `label_map_subject.RATES` for sources)."""
    a, b, c = chance
    if fast:
        return {
            "ventricles": 0.080 + 0.015 * severity + a / 2,
            "hippocampus": -(0.040 + 0.008 * severity + b / 3),
            "cortex": -(0.011 + 0.003 * severity + c / 2),
        }
    return {
        "ventricles": 0.015 + 0.040 * severity + a,
        "hippocampus": -(0.005 + 0.022 * severity + b),
        "cortex": -(0.003 + 0.006 * severity + c),
    }
