"""Visits of several channels in a BIDS folder: one image per suffix, all on the grid of the first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage

from lssl.data.bids import bids_files, bids_table, with_sidecars
from lssl.data.nifti import Grid
from lssl.data.pairs import count
from lssl.data.partial import name_visits, with_reference
from lssl.utils.errors import InputError

__all__ = ["channel_table", "onto_grid", "overlap"]


def channel_table(
    root: str | Path, suffixes: Sequence[str], masks: str | None, labels: str | None, select: str, partial: bool = False
) -> tuple[pd.DataFrame, list[str]]:
    """The visits of a BIDS folder that have an image of every suffix; if ``partial``, of any.

    Args:
        root: the folder.
        suffixes: of the channels, in their order.
        masks: pattern of masks, see :func:`lssl.data.bids.match_files`.
        labels: pattern of label maps.
        select: which image of a visit is taken, of every suffix.
        partial: keeps visits that lack some of the channels.

    Returns:
        The table of :func:`lssl.data.bids.bids_table` for the first suffix, with the other images in ``image_1``,
        ``image_2``, …; and phrases, which name the visits that lack a channel. If ``partial``, see
        :func:`lssl.data.partial.with_reference`; :func:`lssl.data.partial.channel_notes` then names the visits.
    """
    if partial:
        return _partial_table(Path(root), suffixes, masks, labels, select)
    first, *others = suffixes
    table, notes = bids_table(root, first, masks, labels, select)
    key = ["subject", "session"]
    for number, suffix in enumerate(others, 1):
        files, more = bids_files(Path(root), suffix, select)
        notes += [note for note in more if not note.endswith(f"without a {suffix} image")]  # named below
        files = files[files["taken"]].rename(columns={"file": f"image_{number}"})[[*key, f"image_{number}"]]
        joined = table.merge(files, on=key, how="outer", indicator="_side")
        for side, has, lacks in (("left_only", first, suffix), ("right_only", suffix, first)):
            rows = joined[joined["_side"] == side]
            if len(rows):
                notes.append(f"{count(len(rows), 'visit')} with {has} but without {lacks} ({name_visits(rows)})")
        table = table.merge(files, on=key)
    if table.empty:
        raise InputError(f"No visit of {root} has images of all of {', '.join(suffixes)}; name fewer suffixes.")
    return table, notes


def _partial_table(
    root: Path, suffixes: Sequence[str], masks: str | None, labels: str | None, select: str
) -> tuple[pd.DataFrame, list[str]]:
    key, notes, failures = ["subject", "session"], [], []
    table = pd.DataFrame(columns=key, dtype=object)
    for number, suffix in enumerate(suffixes):
        column = f"image_{number}" if number else "image"
        try:
            files, more = bids_files(root, suffix, select)
        except InputError as error:  # to predict, another channel is enough
            failures.append(error)
            table[column] = ""
            continue
        notes += [note for note in more if not note.endswith(f"without a {suffix} image")]
        files = files[files["taken"]].rename(columns={"file": column})
        table = table.merge(files[[*key, column]], on=key, how="outer")
    if table.empty:
        raise failures[0]
    table, odd = with_sidecars(root, with_reference(table.fillna("")), masks, labels)
    return table, notes + odd


def overlap(one: Grid, other: Grid) -> bool:
    """Whether two grids share a place: a lattice of 9³ points of either has one within the other."""
    for here, there in ((one, other), (other, one)):
        axes = [np.linspace(0, length - 1, 9) for length in here.shape]
        points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        matrix = np.linalg.inv(there.affine) @ here.affine
        index = points @ matrix[:3, :3].T + matrix[:3, 3]
        if ((index >= -0.5) & (index <= np.asarray(there.shape) - 0.5)).all(1).any():
            return True
    return False


def onto_grid(voxels: np.ndarray, affine: np.ndarray, grid_affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """An image on another grid of the same space, by linear interpolation.

    Axes that the new grid samples k times more coarsely are blurred first, σ = √(k² - 1) / (2 √(2 ln 2)) old voxels
    (Cardoso et al., 2015). Places beyond the image take its darkest value.

    Args:
        voxels: ``(D, H, W)``.
        affine: ``(4, 4)`` index → mm, of the voxels.
        grid_affine: ``(4, 4)`` index → mm, of the new grid.
        shape: voxels per axis of the new grid.

    Returns:
        ``shape`` float32.
    """
    matrix = np.linalg.inv(affine) @ grid_affine
    coarser = np.linalg.norm(matrix[:3, :3], axis=1)
    sigma = np.where(coarser > 1.05, np.sqrt(np.maximum(coarser**2 - 1, 0)) / (2 * np.sqrt(2 * np.log(2))), 0)
    blurred = ndimage.gaussian_filter(voxels, sigma, mode="nearest") if sigma.any() else voxels
    return ndimage.affine_transform(
        blurred, matrix[:3, :3], matrix[:3, 3], tuple(shape), np.float32, order=1, cval=float(voxels.min())
    )
