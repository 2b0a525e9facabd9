"""Whole visits: sliding-window prediction at the training spacing, resampled to the visit's own grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lssl.data.batch import PairBatch
from lssl.data.source import DataSource
from lssl.data.spacing import TOLERANCE, spacing_text
from lssl.utils.errors import InputError
from lssl.utils.memory import refuse_larger_than_memory
from lssl.views import geometry as geo

__all__ = [
    "both_visits",
    "check_memory",
    "check_visits",
    "largest_part",
    "later_label",
    "later_visit",
    "resampled",
    "segment",
    "segment_grid",
    "shown",
    "working_grid",
]

CHUNK = 8  # classes resampled at a time, to limit memory


def working_grid(size: Sequence[int], own: Tensor, wanted: Tensor) -> tuple[list[int], Tensor]:
    """A grid of another spacing over the same box.

    Args:
        size: voxels of the visit.
        own: ``(3,)`` its spacing in mm.
        wanted: ``(3,)`` spacing of the new grid; an axis within 1 % of it is not changed.

    Returns:
        Voxels of the new grid, and ``(4, 4)`` new index → index of the visit; both grids have the same centre.
    """
    factor = torch.where((wanted / own - 1).abs() < 0.01, 1.0, wanted / own).double()
    n = torch.tensor(size, dtype=torch.float64)
    count = (n / factor - 1e-6).ceil().clamp_min(1)
    offset = (n - 1) / 2 - factor * (count - 1) / 2
    return [int(value) for value in count], geo.homogeneous(torch.diag(factor), offset)


def check_memory(
    shape: Sequence[int], own: Sequence[float], wanted: Sequence[float], classes: int, device: torch.device
) -> None:
    """Refuses a whole visit whose working grid cannot fit into memory; nothing is allocated.

    Counted are the three steps of :func:`segment`, in float32: the finer samples of the working grid (image, grid and
    its flipped copy), the probabilities and their accumulation over windows, and the way back to the visit's grid.

    Args:
        shape: ``(C, D, H, W)`` of the visit.
        own: ``(3,)`` its spacing in mm.
        wanted: ``(3,)`` working spacing in mm.
        classes: number of classes.
        device: of the visit.
    """
    channels, *size = shape
    grid, matrix = working_grid(size, torch.tensor(own).double(), torch.tensor(wanted).double())
    inside = math.prod(n * k for n, k in zip(grid, _samples(matrix), strict=True))
    changed = grid != size
    needed = 4 * max(
        (channels + 6) * inside if changed else 0,
        (channels + 2 * classes + 1) * math.prod(grid),
        (classes * math.prod(grid) + (min(classes, CHUNK) + 12) * math.prod(size)) if changed else 0,
    )
    refuse_larger_than_memory(
        needed,
        f"A visit of {'×'.join(map(str, size))} voxels of {spacing_text(own)} mm, on the grid of the working spacing "
        f"({'×'.join(map(str, grid))} voxels of {spacing_text(wanted)} mm),",
        "leave it out, repair its header, or train with a larger views.spacing",
        torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
    )


def check_visits(data: DataSource, wanted: Sequence[float], channels: int, device: torch.device) -> None:
    """:func:`check_memory` of the visits of most voxels and of most mm³, for two classes, before any is read."""
    shapes, sizes = data.shapes(), data.voxel_sizes()
    for row in {int(shapes.prod(1).argmax()), int((shapes * sizes).prod(1).argmax())}:
        check_memory([channels, *shapes[row].tolist()], sizes[row].tolist(), wanted, 2, device)


def segment(
    image: Tensor,
    own: Tensor,
    wanted: Tensor,
    predict: Callable[[Tensor], Tensor],
    window: Sequence[int],
    window_overlap: float = 0.5,
) -> Tensor:
    """Most probable class of each voxel of a visit.

    The image is resampled to the network's spacing (averaged if that is coarser) and predicted in overlapping windows.
    Gaussians blend the windows' probabilities (MONAI), which are then interpolated back.

    Args:
        image: ``(C, D, H, W)``.
        own: ``(3,)`` spacing in mm.
        wanted: ``(3,)`` spacing that the network was trained at.
        predict: images ``(B, C, *window)`` → probabilities ``(B, K, *window)``.
        window: sides of a window.
        window_overlap: of neighbouring windows, as a share of their side.

    Returns:
        ``(D, H, W)`` int64.
    """
    size, matrix = working_grid(image.shape[1:], own.double().cpu(), wanted.double().cpu())
    return segment_grid(resampled(image, size, matrix), matrix, image.shape[1:], predict, window, window_overlap)


def segment_grid(
    image: Tensor,
    matrix: Tensor,
    shape: Sequence[int],
    predict: Callable[[Tensor], Tensor],
    window: Sequence[int],
    window_overlap: float = 0.5,
) -> Tensor:
    """:func:`segment` of an image that is on the network's grid already.

    Args:
        image: ``(C, *size)``, on the grid of :func:`working_grid`.
        matrix: ``(4, 4)`` its index → index of the visit.
        shape: ``(D, H, W)`` of the visit.
        predict: see :func:`segment`.
        window: sides of a window.
        window_overlap: see :func:`segment`.
    """
    from monai.inferers import sliding_window_inference

    probability: Any = sliding_window_inference(
        image[None], list(window), 4, predict, overlap=window_overlap, mode="gaussian"
    )
    if list(image.shape[1:]) == list(shape) and torch.equal(matrix, torch.eye(4, dtype=matrix.dtype)):
        return probability[0].argmax(0)
    back = geo.inverse(matrix)[None].to(image.device)
    best = torch.full(tuple(shape), -1.0, device=image.device)
    label = torch.zeros(tuple(shape), dtype=torch.long, device=image.device)
    for first in range(0, probability.shape[1], CHUNK):
        part = geo.resample(probability[:, first : first + CHUNK], back, shape, padding="border")[0]
        value, index = part.max(0)
        label = torch.where(value > best, index + first, label)
        best = torch.maximum(value, best)
    return label


def largest_part(label: Tensor) -> Tensor:
    """A label map ``(D, H, W)`` without what lies apart from its largest part; voxels that share a corner touch."""
    from scipy import ndimage

    parts, number = ndimage.label((label > 0).cpu().numpy(), np.ones((3, 3, 3)))
    if number < 2:
        return label
    biggest = np.bincount(parts.ravel())[1:].argmax() + 1
    return label.where(torch.from_numpy(parts == biggest).to(label.device), 0)


def resampled(image: Tensor, size: Sequence[int], matrix: Tensor) -> Tensor:
    """The image on the grid of :func:`working_grid`; a coarser voxel is the mean of samples within it."""
    if size == list(image.shape[1:]) and torch.equal(matrix, torch.eye(4, dtype=matrix.dtype)):
        return image
    return geo.resample_mean(image[None], matrix[None].to(image.device), size, _samples(matrix))[0]


def _samples(matrix: Tensor) -> list[int]:
    """Samples of the visit, along each axis, whose mean is a voxel of the working grid."""
    return [max(1, math.ceil(float(factor) - 1e-6)) for factor in matrix.diagonal()[:3]]


def later_label(batch: PairBatch) -> Tensor:
    """``(D, H, W)`` label map of the later visit of a batch of one pair, or of its only visit."""
    if batch.labels is None:
        raise InputError("The visit has no label map.")
    d, h, w = batch.extent[0, 1].tolist()  # an earlier visit may be larger
    return batch.labels[0, 1, :d, :h, :w]


def later_visit(batch: PairBatch) -> PairBatch:
    """The later visit of a batch of one pair, as a same-visit pair without padding."""
    d, h, w = batch.extent[0, 1].tolist()
    batch = batch.visits(torch.ones(1, 2, dtype=torch.long))
    batch.images, batch.foreground = batch.images[..., :d, :h, :w], batch.foreground[..., :d, :h, :w]
    batch.labels = None if batch.labels is None else batch.labels[..., :d, :h, :w]
    return batch


def both_visits(batch: PairBatch, wanted: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Both visits of a batch of one pair on the working grid of the later one, the earlier one through the frame.

    Args:
        batch: one pair.
        wanted: ``(3,)`` working spacing in mm.
        classes: number of classes, for :func:`check_memory`.

    Returns:
        ``(2 C, *size)``, channels of the earlier visit first, and ``(4, 4)`` index → index of the later visit.
    """
    earlier, later = (
        image[:, :d, :h, :w] for image, (d, h, w) in zip(batch.images[0], batch.extent[0].tolist(), strict=True)
    )
    before, after = batch.affines[0].cpu()
    own, shape, wanted = geo.spacing(after), later.shape[1:], wanted.double().cpu()
    check_memory([2 * len(later), *shape], own.tolist(), wanted.tolist(), classes, later.device)
    size, matrix = working_grid(shape, own, wanted)
    there = _brought(earlier, geo.inverse(before) @ after @ matrix, size)
    return torch.cat([there, resampled(later, size, matrix)]), matrix


def shown(affine: Tensor, extent: Tensor, onto: Tensor, size: Sequence[int]) -> Tensor:
    """``(B, *size)`` bool: voxels of a grid that lie within a visit.

    Args:
        affine: ``(B, 4, 4)`` of the visit.
        extent: ``(B, 3)`` its voxels.
        onto: ``(B, 4, 4)`` of the grid.
        size: of the grid.
    """
    index = geo.transform(geo.inverse(affine) @ onto, geo.lattice(size, affine.device))
    return geo.contains(index, extent[:, None]).unflatten(1, tuple(size))


def _brought(image: Tensor, matrix: Tensor, size: list[int]) -> Tensor:
    """An image ``(C, ...)`` on another grid, by ``matrix`` from its index, in one resampling; 0 beyond the image.

    As in views, and in the other visit: where the grid is coarser, a voxel is the mean of samples within it.
    """
    if size == list(image.shape[1:]) and torch.allclose(matrix, torch.eye(4, dtype=matrix.dtype), atol=1e-6):
        return image
    samples = [max(1, math.ceil(step - TOLERANCE)) for step in geo.spacing(matrix).tolist()]
    return geo.resample_mean(image[None], matrix[None].to(image.device), size, samples)[0]
