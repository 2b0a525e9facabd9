"""The phantom's scanner: one visit's T1-weighted image of the anatomy, with contrast, bias, noise and misregistration.

With ``A`` the visit's recorded affine and ``R`` a small rigid residual that registration left behind and no header
knows, the image is

    image(i) = | blur( contrast( tissue( ψ_t(S(R A i)) ) ) ) · exp(bias(i)) + noise |        (Rician)

set to 0 outside the head and divided by its 99.9 % quantile. Each visit has its own ``R``, contrast, bias and noise.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lssl.synthetic.draws import misregistration, uniform
from lssl.synthetic.phantom_ageing import canonical
from lssl.synthetic.phantom_anatomy import paint
from lssl.synthetic.phantom_lesions import Lesion, change_labels, paint_lesions
from lssl.synthetic.phantom_subject import PhantomSubject, Rates, draw_subject, generator

__all__ = ["Scan", "acquire", "normalise", "residual", "scan", "subject", "visit_time"]

_CENTRE = (0.0, -18.0, -3.0)  # frame position (mm) of the field of view's centre


@dataclass(frozen=True)
class Scan:
    """One visit's image and its ground truth.

    Attributes:
        image: ``(D, H, W)`` float32, 0 outside the head and about 1 in the brightest tissue.
        label: ``(D, H, W)`` int16, see `STRUCTURES`.
        head: ``(D, H, W)`` bool.
        affine: ``(4, 4)`` float64, index → frame in mm, as a header would record it.
        residual: ``(4, 4)`` float64, recorded frame → true frame in mm, the misregistration.
        change: ``(D, H, W)`` int16, see `phantom_lesions.CHANGES`; ``None`` without lesions.
    """

    image: Tensor
    label: Tensor
    head: Tensor
    affine: Tensor
    residual: Tensor
    change: Tensor | None = None


@functools.lru_cache(maxsize=4096)
def subject(seed: int, index: int, fast: bool = False, rates: Rates = ()) -> PhantomSubject:
    """`draw_subject`, remembered."""
    return draw_subject(seed, index, fast, rates)


def visit_time(seed: int, index: int, visit: int, interval: float) -> float:
    """Years since the subject's first visit: ``visit · interval``, a quarter of an interval earlier or later."""
    jitter = uniform(generator("time", seed, index, visit), -0.25, 0.25) if visit else 0.0
    return (visit + jitter) * interval


def residual(seed: int, index: int, visit: int, spacing: float) -> Tensor:
    """``R (4, 4)``: at most 0.5° about the centre of the field of view, and a shift of at most half a voxel."""
    centre = torch.tensor(_CENTRE, dtype=torch.float64)
    return misregistration(centre, spacing, generator("residual", seed, index, visit))


def scan(
    seed: int,
    index: int,
    visit: int,
    time: float,
    size: tuple[int, int, int],
    spacing: float,
    fast: bool = False,
    rates: Rates = (),
    lesions: tuple[Lesion, ...] = (),
    contrast: float = 0.0,
) -> Scan:
    """The visit ``visit`` of subject ``index``, ``time`` years after its first, on a grid around the head.

    Args:
        seed: of the population.
        index: of the subject.
        visit: of the subject's visits; it draws contrast, bias, noise and misregistration.
        time: years since the subject's first visit.
        size: voxels along each axis.
        spacing: mm between voxels.
        fast: whether the subject ages as in Alzheimer's disease.
        rates: declared ones, see `draw_subject`.
        lesions: of the subject, see `phantom_lesions.draw_lesions`.
        contrast: share of each tissue's brightness that the visit draws anew, between 0 and 1.
    """
    someone, stream = subject(seed, index, fast, rates), generator("scan", seed, index, visit)
    affine = torch.eye(4, dtype=torch.float64) * spacing
    affine[:3, 3] = torch.tensor(_CENTRE, dtype=torch.float64) - spacing * (torch.tensor(size) - 1) / 2
    affine[3, 3] = 1
    rigid = residual(seed, index, visit, spacing)
    axes = [torch.arange(count, dtype=torch.float32) for count in size]
    index_points = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    matrix = (rigid @ affine).float()
    points = canonical(someone, matrix[:3, :3] @ index_points + matrix[:3, 3:], time)
    other = generator("contrast", seed, index, visit)
    tissue, shape, change = _brightness(someone, stream, contrast, other), torch.Size(size), None
    value, label, head = paint(someone, points, spacing, tissue)
    if lesions:
        value = paint_lesions(value, label, points, spacing, lesions, visit, tissue["lesion"])
        change = change_labels(label, points, lesions, visit).view(shape)
    value = value * (1 + torch.where(label > 0, 0.025, 0.08) * _texture(someone, points))
    inside = head.view(shape)
    image = acquire(value.view(shape), index_points.view(3, *shape), spacing, stream) * inside
    return Scan(normalise(image, inside), label.view(shape), inside, affine, rigid, change)


# T1-weighted brightness, and which of the subject's own factors scales it.
TISSUE: dict[str, tuple[float, str]] = {
    "air": (0.02, "bone"),
    "bone": (0.08, "bone"),
    "csf": (0.17, "csf"),
    "marrow": (0.38, "fat"),
    "muscle": (0.44, "muscle"),
    "lesion": (0.46, "white"),
    "cortex": (0.52, "cortex"),
    "deep": (0.57, "deep"),
    "thalamus": (0.65, "deep"),
    "pallidum": (0.70, "deep"),
    "stem": (0.74, "white"),
    "white": (0.80, "white"),
    "fat": (0.97, "fat"),
}


def _brightness(
    someone: PhantomSubject, stream: torch.Generator, contrast: float, other: torch.Generator
) -> dict[str, float]:
    """The tissues' brightness in one visit: a monotone curve keeps their order, jitter stays below their gaps.

    With ``contrast`` the order may change: that share of each brightness is one of ``other``, uniform in [0.02, 0.97].
    """
    gamma, lift = uniform(stream, 0.85, 1.2), uniform(stream, -0.03, 0.03)
    own: dict[str, float] = {name: uniform(stream, 0.985, 1.015) for name in someone.tissue}
    usual = {
        name: max(0.0, value * someone.tissue[kind] * own[kind]) ** gamma + lift * math.sin(math.pi * value)
        for name, (value, kind) in TISSUE.items()
    }
    return {name: (1 - contrast) * value + contrast * uniform(other, 0.02, 0.97) for name, value in usual.items()}


def _texture(someone: PhantomSubject, points: Tensor) -> Tensor:
    """A pattern of unit variance that belongs to the tissue, and so moves with it."""
    vectors, phases = (part.to(points.dtype) for part in someone.texture)
    return (vectors @ points + phases[:, None]).sin().sum(0) / math.sqrt(len(phases) / 2)


def normalise(image: Tensor, inside: Tensor) -> Tensor:
    """The image over its 99.9 % quantile inside a mask."""
    return image / torch.quantile(image[inside][:: max(1, inside.sum().item() // 200_000)], 0.999)


def acquire(image: Tensor, index: Tensor, spacing: float, stream: torch.Generator) -> Tensor:
    """Blurs slightly, multiplies by a smooth bias field and adds Rician noise.

    Args:
        image: ``(D, H, W)``.
        index: ``(3, D, H, W)`` index of each voxel.
        spacing: mm between voxels.
        stream: draws the scanner's state.
    """
    sigma = uniform(stream, 0.25, 0.45)
    taps = torch.exp(-torch.tensor([-1.0, 0.0, 1.0]).square() / (2 * sigma**2))
    kernel = taps / taps.sum()
    image = image[None, None]
    for axis in range(3):
        view = [1, 1, 1, 1, 1]
        view[2 + axis] = 3
        padding = [0, 0, 0]
        padding[axis] = 1
        image = F.conv3d(image, kernel.view(view), padding=padding)
    image = image[0, 0]
    image = image * _bias(index, image.shape, spacing, stream)
    noise = uniform(stream, 0.010, 0.022) * torch.randn(2, *image.shape, generator=stream)
    return ((image + noise[0]).square() + noise[1].square()).sqrt()


def _bias(index: Tensor, size: torch.Size, spacing: float, stream: torch.Generator) -> Tensor:
    """``exp`` of three slow waves (190 to 400 mm long), about ±15 %."""
    direction = torch.randn(3, 3, generator=stream)
    length = 190 + 210 * torch.rand(3, 1, generator=stream)
    phase = 2 * math.pi * torch.rand(3, generator=stream)
    height = uniform(stream, 0.03, 0.09)
    vectors = direction / direction.norm(dim=1, keepdim=True) * (2 * math.pi * spacing / length)
    wave = (torch.tensordot(vectors, index, dims=1) + phase[:, None, None, None]).sin()
    return (height * wave.sum(0)).exp()
