"""How the phantom ages: a smooth, known deformation of its anatomy.

A frame point ``x`` (mm, RAS+) of a visit ``t`` years after baseline goes to canonical coordinates

    X = ψ_t(S(x)),        ψ_t(X) = X + Σ_k α_k(t) w_k(X),        α_k(t) = a_k t + b_k t².

``S`` is the subject's own shape, three scales and a smooth warp, constant in time. ``ψ_t`` says where the material that
lies at ``X`` at time ``t`` lay at baseline. Its fields are smooth: ``w_ventricles`` and ``w_hippocampus`` are sums of
``(c − X) max(0, 1 − |X − c|² / R²)³`` over centres ``c`` along the structure, and ``w_cortex`` points inwards in a
shell that holds the cortex and ends behind the dura, so that the subarachnoid space takes up what the cortex gives
away. Visits differ in shape by nothing else: the correspondence that carries the baseline to time ``t`` is
``φ_t = S⁻¹ ∘ ψ_t⁻¹ ∘ S``, and the volume of a structure is the integral of ``det ∂φ_t/∂x`` over it.

The amplitudes are solved for, such that the volumes of ventricles, hippocampi and cortex follow
``V(t) = V(0) exp(r t)`` with the subject's own rates ``r`` per year: ``a`` from the slope at baseline, ``b`` from the
volumes after six years. In between and a few years beyond, volumes follow the law to a few hundredths of the rate.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lssl.synthetic.phantom_anatomy import paint
from lssl.synthetic.phantom_shapes import TUBES, cerebrum
from lssl.synthetic.phantom_subject import PhantomSubject

__all__ = [
    "LONGEST",
    "LONGEST_FAST",
    "RATED",
    "amplitudes",
    "canonical",
    "displacement",
    "jacobian",
    "labels_at",
    "locate",
    "structure_rates",
    "volumes",
]

RATED: dict[str, tuple[int, ...]] = {"ventricles": (4, 43), "hippocampus": (17, 53), "cortex": (3, 42)}
"""The structures whose volumes change at known yearly rates, and their labels."""

LONGEST, LONGEST_FAST = 12.0, 6.0
"""Years for which the deformation is known to be invertible and the volumes follow their rates: of an ordinary and of a
fast subject."""

_HORIZON = 6.0  # years
_STEP = 2.5  # mm
_REACH = {"ventricles": 29.0, "hippocampus": 18.0}  # R, mm
_CENTRES = {
    "ventricles": TUBES["ventricle"] + TUBES["temporal horn"][1:3] + TUBES["occipital horn"][1:2],
    "hippocampus": TUBES["hippocampus"][:4],
}


def _blobs(points: Tensor, name: str) -> Tensor:
    """``Σ_c (c − X) max(0, 1 − |X − c|² / R²)³`` over the centres of a structure and their mirror images."""
    reach = _REACH[name]
    right = torch.tensor([knot[:3] for knot in _CENTRES[name]], dtype=points.dtype)
    centres = torch.cat([right, right * right.new_tensor([-1, 1, 1])])
    low, high = centres.amin(0)[:, None] - reach, centres.amax(0)[:, None] + reach
    near = ((points > low) & (points < high)).all(0).nonzero().squeeze(1)
    inside = points[:, near]
    square = centres.square().sum(1)[:, None] - 2 * centres @ inside + inside.square().sum(0)
    weight = (1 - square / reach**2).clamp_min(0) ** 3
    field = torch.zeros_like(points)
    field[:, near] = centres.T @ weight - inside * weight.sum(0)
    return field


def _smooth_step(x: Tensor) -> Tensor:
    """From 0 at 0 to 1 at 1 with two continuous derivatives."""
    x = x.clamp(0, 1)
    return x**3 * (x * (6 * x - 15) + 10)


def _shell(subject: PhantomSubject, points: Tensor) -> Tensor:
    """Inwards near the hull, 0 from 30 mm below it and beyond the dura; faster where the subject's gradient points."""
    hull = cerebrum(points)
    outward = (points - points.new_tensor([0.0, -17.0, 5.0])[:, None]) / 60
    faster = 1 + (subject.gradient.to(points.dtype)[:, None] * outward).sum(0)
    profile = _smooth_step((hull + 30) / 29) * _smooth_step(
        (subject.layers[0] + 1.5 - hull) / (subject.layers[0] + 2.5)
    )
    return -10 * outward * (faster * profile)


def _shape(subject: PhantomSubject, points: Tensor) -> Tensor:
    """``S``: frame → canonical, at baseline."""
    vectors, phases, amplitude = (part.to(points.dtype) for part in subject.warp)
    wave = (vectors @ points + phases[:, None]).sin()
    return points / subject.scale.to(points.dtype)[:, None] + amplitude.T @ wave


def _pull_back(subject: PhantomSubject, points: Tensor, alpha: tuple[float, ...]) -> Tensor:
    """``ψ``: adds the three fields with amplitudes ``alpha``."""
    moved = points
    for strength, name in zip(alpha, RATED, strict=True):
        if strength:
            field = _shell(subject, points) if name == "cortex" else _blobs(points, name)
            moved = moved + strength * field
    return moved


def canonical(subject: PhantomSubject, points: Tensor, time: float = 0.0) -> Tensor:
    """Canonical coordinates ``ψ_t(S(x))`` of frame points ``(3, N)`` in mm, ``time`` years after baseline."""
    return _pull_back(subject, _shape(subject, points), amplitudes(subject, time))


def locate(subject: PhantomSubject, points: Tensor, time: float = 0.0) -> Tensor:
    """Frame points ``(3, N)`` in mm, ``time`` years after baseline, of canonical ones: the inverse of `canonical`.

    Composed with another subject's or time's `canonical`, it carries any place of one head to the same place of the
    other. Between subjects that is the place in the average head: sizes and folds of structures differ about it.
    """
    return _solve(subject, points, amplitudes(subject, time), points * subject.scale.to(points.dtype)[:, None])


def displacement(subject: PhantomSubject, points: Tensor, time: float) -> Tensor:
    """``φ_t(x) − x`` in mm: how far the material at frame points ``(3, N)`` of baseline has moved in ``time`` years."""
    return _displacement(subject, points, amplitudes(subject, time))


def jacobian(subject: PhantomSubject, points: Tensor, time: float) -> Tensor:
    """``det ∂φ_t/∂x`` at baseline points ``(3, N)`` of the frame: the factor by which the volume there has changed."""
    return _jacobian(subject, points.double(), amplitudes(subject, time))


def labels_at(subject: PhantomSubject, points: Tensor, time: float = 0.0) -> Tensor:
    """Labels ``(N,)`` of frame points ``(3, N)``, without partial volume."""
    return paint(subject, canonical(subject, points, time))[1]


def volumes(subject: PhantomSubject, time: float = 0.0, step: float = _STEP) -> dict[int, float]:
    """Volume of each label in mm³ at ``time`` years, without partial volume.

    The baseline labels of a lattice of ``step`` mm are integrated with ``det ∂φ_t/∂x``, so the change is free of the
    error with which voxels are counted.
    """
    points, label = _lattice(subject, step)
    change = jacobian(subject, points, time) if time else torch.ones_like(points[0])
    return {int(name): change[label == name].sum().item() * step**3 for name in label.unique()}


def structure_rates(subject: PhantomSubject, step: float = _STEP) -> dict[int, float]:
    """Label → change of the logarithm of its volume per year, at baseline.

    Those of `RATED` are prescribed. The other structures follow the same fields, which is no claim about ageing: the
    caudate, around which the ventricle swells, grows by 0.4 times the ventricle's rate.
    """
    points, label = _lattice(subject, step)
    change = jacobian(subject, points, 0.1)
    return {int(name): change[label == name].mean().log().item() / 0.1 for name in label.unique()}


def amplitudes(subject: PhantomSubject, time: float) -> tuple[float, ...]:
    """``α_k(t)`` of the three fields, in the order of `RATED`."""
    if time == 0:
        return (0.0, 0.0, 0.0)
    slope, curve = _course(subject)
    return tuple((time * (slope + curve * time)).tolist())


@functools.lru_cache(maxsize=4096)
def _course(subject: PhantomSubject) -> tuple[Tensor, Tensor]:
    """``a`` and ``b`` of ``α(t) = a t + b t²``, from the lattice that also gives the volumes."""
    points, label = _lattice(subject, _STEP)
    groups = [points[:, torch.isin(label, torch.tensor(names))] for names in RATED.values()]
    groups[-1] = groups[-1][:, ::5]  # the cortex is large
    sizes = [group.shape[1] for group in groups]

    def growth(alpha: Tensor) -> Tensor:
        change = _jacobian(subject, torch.cat(groups, 1), tuple(alpha.tolist()))
        return torch.stack([part.mean() for part in change.split(sizes)]).log()

    little = 1e-3 * torch.eye(3, dtype=torch.float64)
    inverse = torch.stack([growth(alpha) for alpha in little], 1).mul(1e3).inverse()
    rates = torch.tensor([subject.rates[name] for name in RATED], dtype=torch.float64)
    slope = inverse @ rates
    late = slope * _HORIZON
    for _ in range(4):  # Newton's steps with the matrix of baseline, which is close enough
        late = late + inverse @ (rates * _HORIZON - growth(late))
    return slope, (late / _HORIZON - slope) / _HORIZON


@functools.lru_cache(maxsize=8)
def _lattice(subject: PhantomSubject, step: float) -> tuple[Tensor, Tensor]:
    """The lattice points ``(3, N)`` of the frame that have a label at baseline, and the labels."""
    ranges = [torch.arange(low, high, step, dtype=torch.float64) for low, high in ((-84, 84), (-116, 84), (-86, 90))]
    points = torch.stack(torch.meshgrid(*ranges, indexing="ij")).flatten(1)
    label = labels_at(subject, points.float())
    return points[:, label > 0], label[label > 0]


def _displacement(subject: PhantomSubject, points: Tensor, alpha: tuple[float, ...]) -> Tensor:
    return _solve(subject, _shape(subject, points), alpha, points) - points


def _solve(subject: PhantomSubject, target: Tensor, alpha: tuple[float, ...], start: Tensor) -> Tensor:
    """``y`` with ``ψ(S(y)) = target`` by a fixed-point iteration; ``S`` and ``ψ`` are mild, so it contracts."""
    scale, moved = subject.scale.to(target.dtype)[:, None], start
    for _ in range(40):
        miss = target - _pull_back(subject, _shape(subject, moved), alpha)
        moved = moved + scale * miss
        if miss.abs().max() < (1e-7 if target.dtype == torch.float64 else 1e-4):
            break
    return moved


def _jacobian(subject: PhantomSubject, points: Tensor, alpha: tuple[float, ...]) -> Tensor:
    """``det ∂φ/∂x = det ∂S(x)/∂x / det ∂ψ(S(y))/∂y`` at ``y = φ(x)``, as ``ψ(S(φ(x))) = S(x)``."""
    moved = points + _displacement(subject, points, alpha)
    return _stretch(subject, points, (0.0, 0.0, 0.0)) / _stretch(subject, moved, alpha)


def _stretch(subject: PhantomSubject, points: Tensor, alpha: tuple[float, ...], step: float = 0.1) -> Tensor:
    """``det ∂ψ(S(x))/∂x`` by central differences."""
    columns = []
    for axis in range(3):
        offset = step * torch.eye(3, dtype=points.dtype)[:, axis : axis + 1]
        ahead, behind = (_pull_back(subject, _shape(subject, points + sign * offset), alpha) for sign in (1, -1))
        columns.append((ahead - behind) / (2 * step))
    (a, b, c), (d, e, f), (g, h, i) = columns
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
