"""Reading a folder that ``lssl prepare`` wrote: only the boxes that are needed, as int16."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lssl.data.batch import Visit
from lssl.data.boxes import around
from lssl.data.pairs import count
from lssl.data.store import StoredVisit, read_stored
from lssl.data.tables import csv_table
from lssl.utils.errors import InputError

__all__ = ["PreparedFolder", "is_prepared"]

WANTED = (
    "subject",
    "session",
    "age",
    "days",
    "image",
    "site",
    "split",
    "size_d",
    "size_h",
    "size_w",
    "channels",
    "flags",
)


def is_prepared(root: str | Path | None) -> bool:
    """Whether ``lssl prepare`` wrote this folder."""
    return root is not None and (Path(root) / "dataset.json").is_file() and (Path(root) / "visits.csv").is_file()


class PreparedFolder:
    """The visits of a prepared folder; paths are flat bytes, so that workers share them without copying.

    Files are opened for each box, which costs a tenth of a millisecond, instead of keeping handles open. With a budget,
    the compressed bytes of the first visits read are kept until it is spent; nothing is thrown out again, as every
    epoch visits all subjects.

    Args:
        root: the folder.
        table: CSV of visits, instead of the folder's own ``visits.csv``: a part of its rows, perhaps with a split.
        budget: bytes that this process may keep in memory.
    """

    def __init__(self, root: str | Path, table: str | Path | None = None, budget: int = 0) -> None:
        self.root, self.csv, self.budget = Path(root), Path(table or Path(root) / "visits.csv"), budget
        self.channels: list[str] = []
        self._kept: dict[int, bytes] = {}
        self._spent = 0
        self._paths = np.zeros(0, "S1")
        self.shapes = np.zeros((0, 3), np.int32)

    def table(self) -> tuple[pd.DataFrame, list[str]]:
        """The visit table, and remarks on it."""
        table = csv_table(self.csv, self.root, WANTED)
        if missing := [name for name in ("size_d", "size_h", "size_w") if name not in table]:
            raise InputError(
                f"The table {self.csv} lacks the columns {', '.join(missing)}; make it from the rows of "
                f"{self.root / 'visits.csv'}."
            )
        names = table["channels"].dropna().unique().tolist() if "channels" in table else []
        self.channels = sorted({channel for name in names for channel in name.split("+")})
        notes = [f"prepared channels {', '.join(self.channels)}"] if self.channels else []
        if "flags" in table and (flagged := int(table["flags"].fillna("").astype(bool).sum())):
            notes.append(f"{count(flagged, 'visit')} to look at, see the column flags of visits.csv")
        return table, notes

    def in_template(self) -> bool:
        """Whether the subjects were brought into the space of one template."""
        options = json.loads((self.root / "dataset.json").read_text()).get("options", {})
        return bool(options.get("template"))

    def keep(self, table: pd.DataFrame) -> None:
        """Notes where the visits of the sorted table lie."""
        self._paths = np.array([os.fsencode(path) for path in table["image"].tolist()])
        self.shapes = table[["size_d", "size_h", "size_w"]].to_numpy(int)

    def open(self, row: int) -> StoredVisit:
        """The visit of a row, from memory if it is there."""
        path = os.fsdecode(self._paths[row])
        if self.budget <= 0:
            return read_stored(path)
        frame = self._kept.get(row)
        if frame is None and self._spent < self.budget:
            try:
                frame = Path(path).read_bytes()
            except OSError:
                return read_stored(path)  # says what is wrong
            if self._spent + len(frame) <= self.budget:
                self._kept[row] = frame
                self._spent += len(frame)
        return read_stored(path, frame)

    def pair(self, row: int, later: int, size: tuple[int, int, int] | None, seed: int | None) -> tuple[Visit, Visit]:
        """The same box of two visits; see :meth:`.base.PairDataModule.read_pair`."""
        first = self.open(row)
        second = first if later == row else self.open(later)
        start, cut = [0, 0, 0], list(first.shape)
        if size is not None:
            start, cut = around(_centre(first, second, seed), size, first.shape)
        one = _visit(first, start, cut)
        return one, one if later == row else _visit(second, start, cut)


def _centre(first: StoredVisit, second: StoredVisit, seed: int | None) -> list[int]:
    """A random foreground place of either visit, or the middle of both foregrounds' bounding box."""
    if seed is None:
        low, high = np.minimum(first.bounds[0], second.bounds[0]), np.maximum(first.bounds[1], second.bounds[1])
        return ((low + high) // 2).tolist()
    generator = torch.Generator().manual_seed(seed)
    places = np.concatenate([first.places, second.places])
    if not len(places):
        return [int(torch.randint(length, (1,), generator=generator)) for length in first.shape]
    return places[int(torch.randint(len(places), (1,), generator=generator))].tolist()


def _visit(stored: StoredVisit, start: Sequence[int], size: Sequence[int]) -> Visit:
    image, foreground, label = stored.box(start, size)
    affine = torch.from_numpy(stored.affine).clone()
    affine[:3, 3] += affine[:3, :3] @ torch.tensor(start, dtype=affine.dtype)
    return Visit(
        image=torch.from_numpy(image),
        affine=affine,
        foreground=torch.from_numpy(foreground),
        label=None if label is None else torch.from_numpy(label),
    )
