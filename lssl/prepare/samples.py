"""The middle slices of some visits, for the sheet of ``lssl inspect``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lssl.prepare.looks import windowed
from lssl.prepare.picture import middle
from lssl.utils.canvas import planes

__all__ = ["Sample", "raw_sample", "stored_sample"]


@dataclass(frozen=True)
class Sample:
    """A visit on the sheet.

    Attributes:
        slices: axial, coronal and sagittal.
        affine: ``(4, 4)`` of the volume in canonical axes, mm.
        note: orientation of its file, and voxel size.
    """

    slices: list[np.ndarray]
    affine: np.ndarray
    note: str


def raw_sample(voxels: np.ndarray, affine: np.ndarray, high: float, path: str) -> Sample:
    """Of a file.

    Args:
        voxels: ``(D, H, W)``, in closest canonical axes.
        affine: ``(4, 4)`` of them.
        high: the value that is 1.
        path: of the file, whose header tells its own axes.
    """
    from nibabel.orientations import aff2axcodes

    from lssl.data.header import knows_orientation, open_image

    header: Any = open_image(path)
    axes = "".join(aff2axcodes(header.affine)) if knows_orientation(header) else "orientation unknown"
    scaled = (voxels / max(high, 1e-6)).clip(0, None)
    step = np.linalg.norm(affine[:3, :3], axis=0)
    slices = planes(scaled, middle(scaled, float(step[2])))
    return Sample(windowed(slices), affine, f"{axes}, {_size(step)}")


def stored_sample(path: str) -> Sample:
    """Of a prepared visit, of which three slabs are read."""
    from lssl.data import STEP
    from lssl.data.store import read_stored

    stored = read_stored(path)
    slices = []
    for plane, axis in enumerate((2, 1, 0)):
        corner, side = [0, 0, 0], list(stored.shape)
        corner[axis], side[axis] = stored.shape[axis] // 2, 1
        box = stored.box((corner[0], corner[1], corner[2]), (side[0], side[1], side[2]))[0][0] * STEP
        slices.append(planes(box, (0, 0, 0))[plane])
    return Sample(windowed(slices), stored.affine, f"prepared, {_size(np.linalg.norm(stored.affine[:3, :3], axis=0))}")


def _size(step: np.ndarray) -> str:
    return "×".join(f"{value:.3g}" for value in step) + " mm"
