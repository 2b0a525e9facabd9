"""NiftiDataModule: pairs from NIfTI files: a BIDS folder, a table of visits, or one file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_info

from lssl.data.batch import Visit
from lssl.data.bids import match_files
from lssl.data.channels import channel_table, onto_grid, overlap
from lssl.data.datamodule import PairDataModule
from lssl.data.nifti import Grid, automatic_foreground, read_grids, read_image, read_label, read_mask, scale
from lssl.data.pairs import count, visit_name
from lssl.data.partial import channel_files, keeps_partial
from lssl.data.recognise import is_prepared
from lssl.data.tables import csv_table, file_table
from lssl.data.usable import check_files, leave_out, without_visits
from lssl.utils.errors import InputError

__all__ = ["NiftiDataModule", "refuse_moving_subjects"]


class NiftiDataModule(PairDataModule):
    """Pairs of visits from NIfTI files: a BIDS folder, a table of visits, or one file.

    A BIDS folder holds ``sub-*/[ses-*]/anat/*_<suffix>.nii[.gz]``. A table (CSV or TSV) has the columns subject,
    session, image, and optionally age, days or date, mask, label, site, split. In a BIDS folder, times are read from
    ``sessions.tsv``, ``scans.tsv``, ``participants.tsv`` and session labels that carry them (``ses-d0129`` in days,
    ``ses-M024`` in months); ``docs/times.md`` has the order of trust. Subjects whose visits have no known order are
    counted; they give no pairs for policies that need an order.

    All visits of a subject must lie on one grid in one space. Headers of all files are checked before training. Every
    read decompresses a whole file. Voxels are reoriented to the closest canonical axes and scaled per visit: background
    0, 99.9th percentile of the foreground 1.

    Args:
        root: the BIDS folder, or a single NIfTI file; with ``table``, the folder that its relative paths start from
            (default: the table's own).
        suffix: end of the image names in the BIDS folder, which may carry entities: ``T1w``, ``run-1_T1w``,
            ``ce-gad_T1w``. Images with contrast agent are left out unless the suffix names them. A list,
            ``[T1w, FLAIR]``, gives a visit one channel per suffix, in this order. Channels on another grid of the same
            space are resampled to the first that the visit has, and each is scaled by itself. In a table, each channel
            has a column named like its suffix.
        select: which image is taken if a visit has several, ``"run=last rec=norm,none space=native"``; see
            :func:`lssl.data.selection.choose` for the defaults.
        masks: pattern of brain or head masks below ``root``, such as
            ``derivatives/masks/{subject}/**/{subject}_{session}_desc-brain_mask.nii.gz``; without ``{session}``, one
            mask serves all visits of a subject. Visits without a mask get an automatic foreground.
        labels: pattern of label maps, like ``masks``.
        table: table of visits, instead of the BIDS layout. Its columns mask and label override the patterns.
        common_frame: whether all subjects are aligned to one template, so that a position in mm shows about the same
            anatomy in each.
        exclude: subjects (``sub-01``) and visits (``sub-01 ses-02``) that are left out.
        missing_channels: whether visits that lack some of several channels are left out (``drop``), or used with these
            channels at 0 (``keep``). With ``keep``, a mask or label map lies on the grid of the first image that its
            visit has.
        **options: those of :class:`PairDataModule`.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        suffix: str | list[str] = "T1w",
        select: str = "",
        masks: str | None = None,
        labels: str | None = None,
        table: str | Path | None = None,
        common_frame: bool = False,
        exclude: Sequence[str] = (),
        missing_channels: Literal["drop", "keep"] = "drop",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.partial = keeps_partial(missing_channels)
        if root is None and table is None:
            raise InputError("There is no data: give root (a BIDS folder or a NIfTI file) or table (a CSV of visits).")
        if is_prepared(root):
            raise InputError(f"{root} was written by `lssl prepare`; read it with PreparedDataModule.")
        self.suffixes = [suffix] if isinstance(suffix, str) else list(suffix)
        if not self.suffixes or len(set(self.suffixes)) < len(self.suffixes):
            raise InputError(f"suffix is {suffix}; name at least one, and every one once.")
        if len(self.suffixes) > 1 and table is None and Path(str(root)).is_file():
            raise InputError("Several suffixes need a BIDS folder or a table; a file gives one image.")
        self.root, self.select, self.csv = root, select, table
        self.masks, self.labels = masks, labels
        self.common_frame, self.exclude = common_frame, tuple(exclude)

    def prepare_data(self) -> None:
        """On several devices, one process checks the files first, so that the others find its answers."""
        if self.trainer and self.trainer.world_size > 1:
            with suppress(InputError):  # setup raises it in every process
                self.visit_table()

    @property
    def location(self) -> str:
        """The folder, or the table if one is given."""
        return str(self.root if self.csv is None else self.csv)

    def visit_table(self) -> pd.DataFrame:
        """One row per usable visit, with the paths of its image, mask and label map.

        Each file is read once and the result is cached, see :mod:`lssl.data.usable`. A visit that cannot be read is
        left out, counted and named.
        """
        table, phrases = without_visits(self._listed_visits(), self.exclude)
        self.excluded += phrases
        for column in (*self._images(), "mask", "label"):
            paths = {path for path in table[column] if path}
            problems = check_files(paths, column.partition("_")[0], rank_zero_info)
            if problems and len(problems) == len(paths) and not self.predicting:
                raise InputError(problems[min(problems)])
            table, phrases = leave_out(table, problems, column)
            self.excluded += phrases
        return table

    def _images(self) -> list[str]:
        """Columns of the table with the channels' files."""
        return ["image", *(f"image_{number}" for number in range(1, len(self.suffixes)))]

    def _listed_visits(self) -> pd.DataFrame:
        labels = None if self.predicting else self.labels  # prediction needs no labels
        if self.csv is None and Path(str(self.root)).is_file():
            return file_table(str(self.root))
        if self.csv is None:
            table, notes = channel_table(str(self.root), self.suffixes, self.masks, labels, self.select, self.partial)
            self.notes += notes
            return table
        if self.select:
            raise InputError("select chooses among the images of a BIDS folder; a table names one image per visit.")
        table, notes = csv_table(self.csv, self.root, suffixes=self.suffixes, partial=self.partial)
        self.notes += notes
        folder = Path(self.csv).parent if self.root is None else self.root
        for column, pattern in (("mask", self.masks), ("label", labels)):
            if pattern and not table[column].any():
                table[column] = match_files(folder, pattern, table, f"{column}s")
        return table

    def inspect(self, table: pd.DataFrame) -> None:
        """Checks all headers; keeps paths as flat bytes, which workers share without copying."""
        grids = read_grids(table["image"].tolist())
        self._shapes = np.stack([grid.shape for grid in grids])
        self._voxel_sizes = np.stack([np.linalg.norm(grid.affine[:3, :3], axis=0) for grid in grids])
        if not self.predicting:  # prediction takes each visit alone
            refuse_moving_subjects(table, grids)
        for column, suffix in zip(self._images()[1:], self.suffixes[1:], strict=True):
            if moved := _on_other_grids(table, grids, column):
                what, grid = count(moved, f"{suffix} image"), "first image" if self.partial else self.suffixes[0]
                self.notes.append(f"{what} on another grid, resampled to the grid of the {grid}")
        for column in ("mask", "label"):
            _refuse_other_grid(table, grids, column)
            missing = int((table[column] == "").sum())
            if missing < len(table) and missing:
                instead = "; their foreground is found automatically" if column == "mask" else ""
                self.notes.append(f"{count(missing, 'visit')} without a {column}{instead}")
        for column in ("mask", "label"):
            self.notes += _shared(table, column, self.labels is None)
        files = channel_files(table, len(self.suffixes))
        self._channels = np.array([[os.fsencode(path) for path in visit] for visit in files]).reshape(files.shape)
        self._paths = {
            name: np.array([os.fsencode(path) for path in table[name].tolist()]) for name in ("mask", "label")
        }

    def channels(self) -> list[str]:
        """One channel per suffix, named like it."""
        return list(self.suffixes) if self.csv is None or len(self.suffixes) > 1 else ["image"]

    def present(self) -> np.ndarray | None:
        """``(visits, C)`` bool, from the table."""
        has = self._channels != b""
        return None if has.all() else has

    def shapes(self) -> np.ndarray:
        """``(visits, 3)`` voxels per axis, from the headers."""
        return self._shapes

    def voxel_sizes(self) -> np.ndarray:
        """``(visits, 3)`` mm, from the headers."""
        return self._voxel_sizes

    def has_label(self) -> np.ndarray:
        """``(visits,)`` bool, from the table."""
        return (self.table["label"] != "").to_numpy()

    def read_label(self, row: int) -> np.ndarray | None:
        """The label map alone."""
        path = os.fsdecode(self._paths["label"][row])
        return read_label(path) if path else None

    def read(self, row: int) -> Visit:
        """Reads and scales the whole visit in a row of the table."""
        files = [os.fsdecode(path) for path in self._channels[row]]
        mask, label = (os.fsdecode(self._paths[name][row]) for name in ("mask", "label"))
        first = next(path for path in files if path)
        voxels, affine = read_image(first)
        foreground = read_mask(mask) if mask else automatic_foreground(voxels)
        image = np.zeros((len(files), *voxels.shape), np.float32)
        for number, path in enumerate(files):
            if path:
                image[number] = scale(voxels if path == first else _on_grid(path, voxels, affine), foreground)
        present = torch.tensor([path != "" for path in files])
        return Visit(
            image=torch.from_numpy(image),
            affine=torch.from_numpy(affine),
            foreground=torch.from_numpy(foreground),
            label=torch.from_numpy(read_label(label)) if label else None,
            present=None if present.all() else present,
        )

    def reader(self) -> PairDataModule:
        """Also drops the table and the names: workers need only the flat arrays."""
        reader = super().reader()
        reader.table, reader.subjects = pd.DataFrame(), []
        return reader


def _on_grid(path: str, voxels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """An image on the grid of another one."""
    other, where = read_image(path)
    if Grid(np.array(other.shape), where).same(Grid(np.array(voxels.shape), affine)):
        return other
    return onto_grid(other, where, affine, voxels.shape)


def refuse_moving_subjects(table: pd.DataFrame, grids: list[Grid]) -> None:
    """Visits of a subject must lie on one grid in one space; the table is sorted by subject."""
    subject = pd.factorize(table["subject"])[0]
    for row in (np.flatnonzero(np.diff(subject) == 0) + 1).tolist():
        before, here = grids[row - 1], grids[row]
        if not here.same(before):
            shapes = ["×".join(map(str, grid.shape)) for grid in (before, here)]
            how = (
                f"on different grids ({shapes[0]} and {shapes[1]} voxels)"
                if shapes[0] != shapes[1]
                else f"in different spaces (their affines differ by up to {here.distance(before):.3g} mm)"
            )
            sessions = f"{table['session'].iat[row - 1]} and {table['session'].iat[row]}"
            raise InputError(
                f"The visits {sessions} of {table['subject'].iat[row]} lie {how}; "
                f"co-register the visits of each subject with `lssl prepare` first."
            )


def _shared(table: pd.DataFrame, column: str, listed: bool) -> list[str]:
    """A file that serves several visits of a subject is right only if these are aligned, not merely of one protocol.

    A label map of a BIDS folder is refused unless the images are in a named space (``space-…``); a line of a table
    states it. A mask may be off by some voxels, so it is noted.
    """
    files = table.loc[table[column] != "", column]
    rows = files.index[files.duplicated(keep=False)]
    if not len(rows):
        return []
    name = visit_name(table, int(rows[0]))
    named = all("_space-" in os.path.basename(path) for path in table["image"].loc[rows])
    if column == "label" and not listed and not named:
        raise InputError(
            f"The label map {files.loc[rows[0]]} serves several visits, {name} among them, but nothing says that these "
            f"visits are aligned: run `lssl prepare`, which lays it on every visit by the maps that it finds, or name "
            f"the label map of each visit in a table."
        )
    return [f"{count(len(rows), 'visit')} ({name}, …) share the {column} of their subject, as if they were aligned"]


def _on_other_grids(table: pd.DataFrame, grids: list[Grid], column: str) -> int:
    """How many images of a further channel lie on another grid than the first; one elsewhere in space is refused."""
    rows = np.flatnonzero(table[column] != "").tolist()
    others = dict(zip(rows, read_grids(table[column].iloc[rows].tolist()), strict=True))
    moved = [row for row in rows if not others[row].same(grids[row])]
    for row in moved:
        if not overlap(grids[row], others[row]):
            raise InputError(
                f"{table[column].iat[row]} and {table['image'].iat[row]} are channels of {visit_name(table, row)} but "
                f"share no place in space; co-register them, or leave the visit out with exclude."
            )
    return len(moved)


def _refuse_other_grid(table: pd.DataFrame, grids: list[Grid], column: str) -> None:
    """A mask or label map must lie on the grid of its image."""
    rows = np.flatnonzero(table[column] != "").tolist()
    paths = table[column].iloc[rows].tolist()
    unique = list(dict.fromkeys(paths))
    found = dict(zip(unique, read_grids(unique), strict=True))
    for row, path in zip(rows, paths, strict=True):
        if not found[path].same(grids[row]):
            raise InputError(
                f"The {column} {path} does not lie on the grid of the image of {visit_name(table, row)} "
                f"({'×'.join(map(str, found[path].shape))} and {'×'.join(map(str, grids[row].shape))} voxels); "
                f"resample it to the image with nearest neighbours."
            )
