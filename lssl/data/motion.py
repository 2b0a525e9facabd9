"""Motion: where the tissue of a visit lies at the other visit of its pair, at knots over the source box."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from lssl.data.batch import Visit

__all__ = ["KNOT", "Moved", "with_motion"]

KNOT = 4.0  # mm between knots, about: those of the fields of `lssl prepare --nonrigid`
NONE = torch.zeros(3, 1, 1, 1)

Moved = Callable[[np.ndarray, int, int], np.ndarray]
"""Points ``(N, 3)`` mm of the visit in one row → where their tissue lies at the visit in another row."""


def with_motion(visits: Sequence[Visit], moved: Moved) -> tuple[Visit, Visit]:
    """The two visits of a pair, each with its motion until the other.

    Between two knots the tissue's displacement is interpolated linearly; beyond the box it is that of its border.
    """
    first, second = visits
    if first.session == second.session:
        return tuple(dataclasses.replace(visit, motion=NONE, motion_affine=visit.affine) for visit in (first, second))  # type: ignore[return-value]
    return _moving(first, second.session, moved), _moving(second, first.session, moved)


def _moving(visit: Visit, other: int, moved: Moved) -> Visit:
    affine, counts = _knots(visit.affine.numpy(), visit.image.shape[1:])
    points = np.indices(counts).reshape(3, -1).T @ affine[:3, :3].T + affine[:3, 3]
    shift = moved(points, visit.session, other) - points
    field = torch.from_numpy(np.nan_to_num(shift).astype(np.float32).T.reshape(3, *counts))
    return dataclasses.replace(visit, motion=field, motion_affine=torch.from_numpy(affine))


def _knots(affine: np.ndarray, size: Sequence[int]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Index → frame of the knots over a box, the first of them at its first voxel, and how many there are."""
    steps = np.maximum(1, np.round(KNOT / np.linalg.norm(affine[:3, :3], axis=0))).astype(int)
    return affine @ np.diag([*steps, 1.0]), tuple(int(-(-(n - 1) // k) + 1) for n, k in zip(size, steps, strict=True))
