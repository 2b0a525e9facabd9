"""Where the tissue of a visit lies in the mean of its subject's visits: displacement fields, coarse and compressed.

A file ``…_field.npz`` holds three arrays, which ``numpy.load`` reads, too: ``to_visit`` and ``from_visit``
``(3, D, H, W)`` float16, mm along the axes of the frame, and ``affine (4, 4)``, index → frame. Between the knots they
are interpolated linearly.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lssl.utils.errors import InputError
from lssl.utils.files import atomic_write

__all__ = ["VisitField", "moved_by", "read_field", "write_field"]


@dataclass
class VisitField:
    """The fields of one visit; each undoes the other.

    Attributes:
        to_visit: ``(3, D, H, W)`` mm: the tissue at ``x`` in the mean of all visits lies at ``x + u(x)`` at this one.
        from_visit: the same from this visit to the mean.
        affine: ``(4, 4)`` float64, index → frame in mm.
    """

    to_visit: np.ndarray
    from_visit: np.ndarray
    affine: np.ndarray


def write_field(path: Path, field: VisitField) -> None:
    """Writes the fields atomically, as float16: to 0.01 mm, as tissue moves by millimetres."""
    with atomic_write(path) as part, part.open("wb") as file:
        halves = {name: getattr(field, name).astype(np.float16) for name in ("to_visit", "from_visit")}
        np.savez_compressed(file, allow_pickle=False, affine=field.affine, **halves)


def read_field(path: str | Path) -> VisitField:
    """Reads the fields of a visit as float32.

    Raises:
        InputError: if the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            fields = [stored[name].astype(np.float32) for name in ("to_visit", "from_visit")]
            found = VisitField(fields[0], fields[1], stored["affine"].astype(np.float64))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; run `lssl prepare --nonrigid` again to restore it.") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is no displacement field or is damaged; run `lssl prepare --nonrigid` again to restore it."
        ) from error
    return found


def moved_by(points: np.ndarray, field: VisitField, way: Literal["to_visit", "from_visit"]) -> np.ndarray:
    """Where the tissue at points ``(N, 3)`` mm lies after one of a visit's maps; at the field's border beyond it."""
    from scipy.ndimage import map_coordinates

    back = np.linalg.inv(field.affine)
    index = points @ back[:3, :3].T + back[:3, 3]
    shift = [map_coordinates(axis, index.T, order=1, mode="nearest") for axis in getattr(field, way)]
    return points + np.stack(shift, 1)
