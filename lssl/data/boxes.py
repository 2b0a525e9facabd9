"""Source boxes: which part of a pair's visits is sent to the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from lssl.data.batch import Visit
from lssl.utils.errors import InputError

__all__ = ["around", "crop", "same_box", "source_box"]


def crop(visit: Visit, start: Sequence[int], size: Sequence[int]) -> Visit:
    """The box of a visit that begins at voxel ``start``; its affine still maps into the same frame."""
    window = tuple(slice(begin, begin + length) for begin, length in zip(start, size, strict=True))
    affine = visit.affine.clone()
    affine[:3, 3] += affine[:3, :3] @ torch.tensor(start, dtype=affine.dtype)
    return dataclasses.replace(
        visit,
        image=visit.image[(slice(None), *window)],
        affine=affine,
        foreground=visit.foreground[window],
        label=None if visit.label is None else visit.label[window],
    )


def same_box(visits: Sequence[Visit], wanted: Sequence[int], seed: int | None = None) -> tuple[Visit, ...]:
    """The same box of each visit; see :func:`source_box`."""
    start, size = source_box(visits, wanted, seed)
    return tuple(crop(visit, start, size) for visit in visits)


def source_box(visits: Sequence[Visit], wanted: Sequence[int], seed: int | None = None) -> tuple[list[int], list[int]]:
    """Start and size of the box to cut from all visits of a pair or series, clipped to the volume.

    Args:
        visits: on the same grid.
        wanted: voxels of the box; where the volume is smaller, the whole axis is taken.
        seed: draws a foreground voxel as the centre; ``None`` takes the centre of the foreground's bounding box.

    Raises:
        InputError: if the visits have different shapes.
    """
    shapes = list(dict.fromkeys("×".join(map(str, visit.image.shape[1:])) for visit in visits))
    if len(shapes) > 1:
        raise InputError(
            f"The visits have {' and '.join(shapes)} voxels, so no box can be cut from all; bring the visits of a "
            f"subject onto one grid, or set source_size to null."
        )
    masks = [visit.foreground for visit in visits]
    centre = _foreground_centre(masks) if seed is None else _foreground_voxel(masks, seed)
    return around(centre, wanted, masks[0].shape)


def around(centre: Sequence[int], wanted: Sequence[int], shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """Start and size of the box of ``wanted`` voxels around a voxel, moved and clipped to lie inside the volume."""
    size = [min(length, have) for length, have in zip(wanted, shape, strict=True)]
    start = [
        min(max(middle - length // 2, 0), have - length)
        for middle, length, have in zip(centre, size, shape, strict=True)
    ]
    return start, size


def _foreground_voxel(masks: Sequence[Tensor], seed: int) -> list[int]:
    """A random voxel that is foreground in any visit; any voxel if all foregrounds are empty."""
    generator = torch.Generator().manual_seed(seed)
    shape = masks[0].shape
    # Listing all foreground voxels costs more than reading a cached box. Of 64 random voxels, one nearly always hits.
    guesses = torch.stack([torch.randint(length, (64,), generator=generator) for length in shape], 1)
    i, j, k = guesses.unbind(1)
    hits = reduce(torch.logical_or, [mask[i, j, k] for mask in masks]).nonzero()
    if len(hits):
        return guesses[hits[0, 0]].tolist()
    voxels = reduce(torch.logical_or, masks).nonzero()
    if not len(voxels):
        return guesses[0].tolist()
    return voxels[torch.randint(len(voxels), (1,), generator=generator)][0].tolist()


def _foreground_centre(masks: Sequence[Tensor]) -> list[int]:
    """Middle of the bounding box of all foregrounds; middle of the volume if all are empty."""
    union = reduce(torch.logical_or, masks)
    if not union.any():
        return [length // 2 for length in union.shape]
    profiles = (union.any(2).any(1), union.any(2).any(0), union.any(1).any(0))
    extents = [profile.nonzero()[:, 0] for profile in profiles]
    return [(int(extent[0]) + int(extent[-1]) + 1) // 2 for extent in extents]
