"""The HDF5 files of Ren et al. (NeurIPS 2022), as the README of their code describes them.

======================================= =================================================================
pretraining: one group per subject      ``t1`` ``(N, W, H, D)``, ``age`` ``(N, 1)``: N visits of the subject
fine-tuning: one group ``img_seg_pair`` ``t1`` and ``seg`` ``(N, W, H, D)``, ``age`` ``(N, 1)``: N images
======================================= =================================================================

The files do not say the voxel size, the directions of the axes or the unit of the age. The voxel size must be given;
axes are taken as RAS unless they are given; ages are taken as years. The rows of ``img_seg_pair`` name no subject, so
each becomes a subject of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nibabel as nib
import numpy as np
import pandas as pd

from lssl.data.pairs import count
from lssl.utils.errors import InputError

__all__ = ["write_visits"]

PAIRS = "img_seg_pair"
PLANES = ("RL", "AP", "SI")


@dataclass
class _Group:
    """A group of the file, checked.

    Attributes:
        name: its key.
        images: ``(N, W, H, D)``, on disk.
        labels: likewise, or ``None``.
        ages: ``(N,)``.
    """

    name: str
    images: Any
    labels: Any
    ages: np.ndarray


def write_visits(
    path: Path, folder: Path, spacing: Sequence[float], axes: str = "RAS"
) -> tuple[pd.DataFrame, list[str]]:
    """Writes every image (and label map) of an HDF5 file as NIfTI; one volume is in memory at a time.

    Args:
        path: the HDF5 file.
        folder: existing folder for the NIfTI files.
        spacing: mm between voxels along the array's three axes.
        axes: direction of the array's axes, as in nibabel: ``RAS`` means left to right, back to front, feet to head.

    Returns:
        A table as :func:`lssl.data.tables.csv_table` reads it, with paths relative to ``folder``; and notes.
    """
    grid = _Grid(tuple(spacing), axes)
    rows, cross_sectional = [], 0
    with _open(path) as file:
        groups = list(_groups(file, path))  # all are checked before anything is written
        for group in groups:
            alone = group.name == PAIRS
            cross_sectional += len(group.images) if alone else 0
            for number in range(len(group.images)):
                subject = f"image-{number + 1:04d}" if alone else group.name
                session = "ses-01" if alone else f"ses-{number + 1:02d}"
                stem = f"{quote(subject, safe='')}_{session}"
                row = {"subject": subject, "session": session, "age": group.ages[number], "image": f"{stem}_t1.nii.gz"}
                grid.save(group.images[number].astype(np.float32), folder / row["image"])
                if group.labels is not None:
                    row["label"] = f"{stem}_seg.nii.gz"
                    where = f"{path}: {group.name}/seg[{number}]"
                    grid.save(_label(group.labels[number], where), folder / row["label"])
                rows.append(row)
    notes = [f"ages are taken as years, axes as {axes}: the file says neither"]
    if cross_sectional:
        notes.append(
            f"{count(cross_sectional, 'row')} of {PAIRS} became subjects of their own, as the file does not say whose "
            "they are; if one person has several, correct the columns subject and session, or a split may part them"
        )
    return pd.DataFrame(rows), notes


class _Grid:
    """Voxel size and directions of all volumes; the middle of a volume is the origin."""

    def __init__(self, spacing: tuple[float, ...], axes: str) -> None:
        if sorted(next((pair for pair in PLANES if letter in pair), letter) for letter in axes) != sorted(PLANES):
            raise InputError(f"--axes is {axes}; give a letter of RL, one of AP and one of SI, such as RAS.")
        self.directions = np.zeros((3, 3))
        for column, (letter, step) in enumerate(zip(axes, spacing, strict=True)):
            axis = next(number for number, pair in enumerate(PLANES) if letter in pair)
            self.directions[axis, column] = step if letter in "RAS" else -step

    def save(self, voxels: np.ndarray, path: Path) -> None:
        """Writes a NIfTI file."""
        affine = np.eye(4)
        affine[:3, :3] = self.directions
        affine[:3, 3] = -self.directions @ ((np.array(voxels.shape) - 1) / 2)
        nib.save(nib.Nifti1Image(voxels, affine), path)


def _open(path: Path) -> Any:
    try:
        import h5py
    except ImportError:
        raise InputError("HDF5 files need h5py: pip install 'lssl[hdf5]'.") from None
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path} cannot be read as HDF5 ({' '.join(str(error).split())}).") from None


def _groups(file: Any, path: Path) -> Iterator[_Group]:
    """Every group; what does not fit the layout is refused."""
    if not len(file):
        raise InputError(f"{path} is empty.")
    for name in file:
        node = file[name]
        if not hasattr(node, "keys") or "t1" not in node:
            raise InputError(f"{path} is not of Ren et al.'s layout: {name} is no group with the array t1.")
        images, labels = node["t1"], node.get("seg")
        if images.ndim != 4 or not all(images.shape):
            raise InputError(f"{path}: {name}/t1 has the shape {images.shape}; it must be (visits, W, H, D).")
        if labels is not None and labels.shape != images.shape:
            raise InputError(f"{path}: {name}/seg has the shape {labels.shape}, but t1 has {images.shape}.")
        ages = np.full(len(images), np.nan) if "age" not in node else np.ravel(node["age"][()]).astype(float)
        if len(ages) != len(images):
            raise InputError(f"{path}: {name} has {count(len(images), 'image')} but {count(len(ages), 'age')}.")
        yield _Group(name, images, labels, ages)


def _label(volume: np.ndarray, where: str) -> np.ndarray:
    whole = np.rint(volume)
    if not np.array_equal(whole, volume) or whole.min() < 0 or whole.max() > np.iinfo(np.int16).max:
        raise InputError(f"{where} is no label map: it has values that are not whole numbers from 0 to 32767.")
    return whole.astype(np.int16)
