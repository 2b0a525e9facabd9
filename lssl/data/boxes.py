"""Source boxes: which part of two visits is sent to the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from lssl.data.batch import Visit
from lssl.utils.errors import InputError

__all__ = ["around", "crop", "source_box"]


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


def source_box(
    first: Visit, second: Visit, wanted: Sequence[int], seed: int | None = None
) -> tuple[list[int], list[int]]:
    """Start and size of the box to cut from both visits, clipped to the volume.

    Args:
        first: earlier visit.
        second: later visit, on the same grid.
        wanted: voxels of the box; where the volume is smaller, the whole axis is taken.
        seed: draws a foreground voxel as the centre; ``None`` takes the centre of the foreground's bounding box.

    Raises:
        InputError: if the visits have different shapes.
    """
    shapes = ["×".join(map(str, visit.image.shape[1:])) for visit in (first, second)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"The visits have {shapes[0]} and {shapes[1]} voxels, so no box can be cut from both; bring the visits of "
            f"a subject onto one grid, or set source_size to null."
        )
    centre = _foreground_centre(first, second) if seed is None else _foreground_voxel(first, second, seed)
    return around(centre, wanted, first.foreground.shape)


def around(centre: Sequence[int], wanted: Sequence[int], shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """Start and size of the box of ``wanted`` voxels around a voxel, moved and clipped to lie inside the volume."""
    size = [min(length, have) for length, have in zip(wanted, shape, strict=True)]
    start = [
        min(max(middle - length // 2, 0), have - length)
        for middle, length, have in zip(centre, size, shape, strict=True)
    ]
    return start, size


def _foreground_voxel(first: Visit, second: Visit, seed: int) -> list[int]:
    """A random voxel that is foreground in either visit; any voxel if both foregrounds are empty."""
    generator = torch.Generator().manual_seed(seed)
    shape = first.foreground.shape
    # Listing all foreground voxels costs more than reading a cached box. Of 64 random voxels, one nearly always hits.
    guesses = torch.stack([torch.randint(length, (64,), generator=generator) for length in shape], 1)
    i, j, k = guesses.unbind(1)
    hits = (first.foreground[i, j, k] | second.foreground[i, j, k]).nonzero()
    if len(hits):
        return guesses[hits[0, 0]].tolist()
    voxels = (first.foreground | second.foreground).nonzero()
    if not len(voxels):
        return guesses[0].tolist()
    return voxels[torch.randint(len(voxels), (1,), generator=generator)][0].tolist()


def _foreground_centre(first: Visit, second: Visit) -> list[int]:
    """Middle of the bounding box of both foregrounds; middle of the volume if both are empty."""
    union: Tensor = first.foreground | second.foreground
    if not union.any():
        return [length // 2 for length in union.shape]
    profiles = (union.any(2).any(1), union.any(2).any(0), union.any(1).any(0))
    extents = [profile.nonzero()[:, 0] for profile in profiles]
    return [(int(extent[0]) + int(extent[-1]) + 1) // 2 for extent in extents]
