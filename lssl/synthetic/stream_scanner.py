"""The scanner of the endless stream: from a visit's tissues to an image with the faults of real ones.

In this order: brightness of the tissues on the map, sampled trilinearly (which blends neighbours, as partial volume
does); skull-stripping, defacing; point spread and thick slices; motion and ghosts (TorchIO's); bias field; noise
(Rician); an incomplete field of view; scaling as for every visit. Labels are those of the nearest voxel of the map:
faults of the image do not change them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lssl.data.batch import Visit
from lssl.synthetic.draws import uniform
from lssl.synthetic.splines import basis, evaluate
from lssl.synthetic.stream_anatomy import BRAIN_END, Anatomy
from lssl.synthetic.stream_contrast import Contrast

__all__ = ["Look", "draw_look", "expose"]

_FLUID = 24  # around the brain


@dataclass(frozen=True)
class Look:
    """What is done to the images of one subject, at both visits.

    Attributes:
        stripped: the brain alone is seen, with the fluid around it (``fluid``) or without (``tight``); else ``no``.
        defaced: the face is cut off.
    """

    stripped: str
    defaced: bool


def draw_look(stream: torch.Generator) -> Look:
    """Two heads in five are stripped of their skull; of the others, one in six is defaced."""
    draw = uniform(stream, 0, 1)
    stripped = "no" if draw > 0.4 else "fluid" if draw < 0.2 else "tight"
    return Look(stripped, uniform(stream, 0, 1) < 1 / 6)


def expose(
    anatomy: Anatomy,
    grid: Tensor,
    contrast: Contrast,
    texture: Tensor,
    lesions: Tensor,
    look: Look,
    spacing: float,
    lateral: bool,
    stream: torch.Generator,
) -> Visit:
    """Image, labels and foreground of one visit; its affine and age are left to the caller.

    Args:
        anatomy: the map.
        grid: ``(1, D, H, W, 3)`` of `Course.sampling_grid`.
        contrast: brightness of the numbers.
        texture: of the map's voxels, a factor that moves with the tissue.
        lesions: bool, of the map's voxels; they are white matter to the labels.
        look: of the subject.
        spacing: mm between voxels.
        lateral: whether classes are told apart by side.
        stream: draws what differs by visit.
    """
    table, lesion = contrast
    value = table[anatomy.numbers][anatomy.code.long()]
    value = torch.where(lesions, lesion, value) * texture
    image = F.grid_sample(value[None, None], grid, align_corners=True)[0, 0]
    code = F.grid_sample(anatomy.code[None, None].float(), grid, mode="nearest", align_corners=True)[0, 0].long()
    number = anatomy.numbers[code]
    inside = code > 0
    if anatomy.labelled:
        if look.stripped != "no":
            inside = inside & (number < BRAIN_END) & ((number != _FLUID) | (look.stripped == "fluid"))
        elif look.defaced:
            inside = inside & ~((number >= BRAIN_END) & _in_face(anatomy, grid))
    stripped = anatomy.labelled and look.stripped != "no"
    image = torch.where(inside, image, 0.0 if stripped else table[0])
    image = _corrupt(_blurred(image, spacing, stream), stream)
    image = _noisy(image * _bias(image.shape, stream), stream)
    seen = _field_of_view(image.shape, stream)
    foreground = inside & seen
    image = image * (foreground if stripped else seen)
    if not foreground.any():
        foreground = seen
    image = (image / _brightest(image[foreground])).clamp(0, 2)
    return Visit(image[None], torch.eye(4, dtype=torch.float64), foreground, label=anatomy.classes(lateral)[code])


def _brightest(values: Tensor) -> Tensor:
    """Their 99.9 % quantile, of at most 20,000 of them: sorting all would take as long as the rest."""
    some = values[:: max(1, len(values) // 20_000)]
    return some.kthvalue(max(1, round(0.999 * len(some)))).values.clamp_min(1e-6)


def _in_face(anatomy: Anatomy, grid: Tensor) -> Tensor:
    """Which voxels lie in front of and below a plane from the forehead to below the brainstem, in the map frame."""
    last = torch.tensor(anatomy.code.shape, dtype=grid.dtype) - 1
    index = (grid[0].flip(-1) + 1) / 2 * last
    y, z = (index @ anatomy.affine[axis, :3] + anatomy.affine[axis, 3] for axis in (1, 2))
    return (y - z > 78) & (z < 0)


def _blurred(image: Tensor, spacing: float, stream: torch.Generator) -> Tensor:
    """Point spread along all axes and, in half of the visits, slices of up to 6 mm along one.

    Each axis is one small matrix: a Gaussian, then, for slices, means over a slice and linear interpolation between the
    slices' centres.
    """
    sigma = uniform(stream, 0.2, 1.1) / spacing  # 0.5 to 2.6 mm full width at half maximum
    thick = uniform(stream, 1, 6) if uniform(stream, 0, 1) < 0.5 else 0.0
    sliced = int(torch.randint(3, (1,), generator=stream))
    for axis in range(3):
        place = torch.arange(image.shape[axis], dtype=torch.float32)
        matrix = torch.exp(-(place[:, None] - place).square() / (2 * max(sigma, 0.05) ** 2))
        if axis == sliced and thick > 1.2 * spacing:
            matrix = _slices(len(place), thick / spacing, uniform(stream, 0, 1)) @ matrix
        matrix = matrix / matrix.sum(1, keepdim=True)
        image = torch.tensordot(matrix, image.movedim(axis, 0), 1).movedim(0, axis)
    return image.contiguous()


def _slices(length: int, thickness: float, phase: float) -> Tensor:
    """``(length, length)``: means over slices of some voxels, then linear interpolation between them."""
    place = torch.arange(length, dtype=torch.float32)
    centre = (torch.arange(math.ceil(length / thickness) + 1) - phase) * thickness
    covered = (0.5 + thickness / 2 - (place - centre[:, None]).abs()).clamp(0, 1)
    covered = covered / covered.sum(1, keepdim=True).clamp_min(1e-6)
    between = (1 - (place[:, None] - centre).abs() / thickness).clamp_min(0)
    return between @ covered


def _corrupt(image: Tensor, stream: torch.Generator) -> Tensor:
    """Ghosts in one visit of ten, motion in one of twenty, by TorchIO."""
    draw, axis = uniform(stream, 0, 1), int(torch.randint(3, (1,), generator=stream))
    numbers = torch.rand(8, generator=stream).tolist()
    if draw >= 0.15:
        return image
    import numpy as np
    import torchio as tio

    transform: Any
    if draw < 0.1:
        transform = tio.Ghosting(2 + int(6 * numbers[0]), axis, 0.2 + 0.5 * numbers[1], restore=0.02)
    else:
        degrees, shift = (np.array([[6 * number - 3 for number in part]]) for part in (numbers[:3], numbers[3:6]))
        transform = tio.Motion(degrees, shift, np.array([0.3 + 0.4 * numbers[6]]), "linear")
    return transform(image[None]).to(image.dtype)[0].clamp_min(0)


def _bias(size: torch.Size, stream: torch.Generator) -> Tensor:
    """A smooth factor, ``exp`` of a spline with a standard deviation of up to 0.3."""
    coefficients = uniform(stream, 0, 0.5) * torch.randn(1, 5, 5, 5, generator=stream)
    return evaluate(coefficients, [basis(torch.linspace(1, 3, length), 5) for length in size])[0].exp()


def _noisy(image: Tensor, stream: torch.Generator) -> Tensor:
    """Rician noise of 0.5 to 8 % of the brightest tissue, mostly little."""
    level = 0.005 * 16 ** uniform(stream, 0, 1)
    real, imaginary = level * torch.randn(2, *image.shape, generator=stream)
    return ((image + real).square() + imaginary.square()).sqrt()


def _field_of_view(size: torch.Size, stream: torch.Generator) -> Tensor:
    """``(D, H, W)`` bool: all, or in one visit of six without up to a quarter at one end of one axis."""
    seen = torch.ones(size, dtype=torch.bool)
    axis, end = torch.randint(3, (1,), generator=stream).item(), uniform(stream, 0, 1) < 0.5
    share = uniform(stream, 0.05, 0.25)
    if uniform(stream, 0, 1) < 1 / 6:
        missing = int(share * size[int(axis)])
        start = size[int(axis)] - missing if end else 0
        seen.narrow(int(axis), start, missing).fill_(False)
    return seen
