"""PreparedDataModule: pairs from a folder that ``lssl prepare`` wrote; only the needed boxes are read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_info

from lssl.data.batch import Visit
from lssl.data.boxes import around
from lssl.data.datamodule import PairDataModule
from lssl.data.fields import VisitField, moved_by, read_field
from lssl.data.pairs import count
from lssl.data.partial import keeps_partial, name_visits, prepared_channels
from lssl.data.recognise import is_prepared, prepared_options
from lssl.data.store import StoredVisit, read_stored
from lssl.data.tables import SIZES, csv_table, with_sizes
from lssl.data.usable import known_problems, leave_out, unopenable, without_visits
from lssl.utils.errors import InputError

__all__ = ["PreparedDataModule"]

WANTED = (
    "subject",
    "session",
    "age",
    "days",
    "image",
    "site",
    "voxel_hash",
    "split",
    "size_d",
    "size_h",
    "size_w",
    "channels",
    "aligned",
    "flags",
    "field",
)


class PreparedDataModule(PairDataModule):
    """Pairs of visits from a folder that ``lssl prepare`` wrote: co-registered, cached, read box by box.

    Boxes are read as int16 and become float32 on the device. Channels, masks and labels are those that ``lssl prepare``
    was given.

    Args:
        root: the prepared folder.
        table: rows of the folder's ``visits.csv``, perhaps with a column split, instead of all of them.
        common_frame: whether all subjects are aligned to one template, so that a position in mm shows about the same
            anatomy in each. ``None``: true if they were prepared with a template.
        cache_gb: memory for compressed visits, divided among the workers. It helps with slow storage; the system
            already caches a local disk.
        exclude: subjects (``sub-01``) and visits (``sub-01 ses-02``) that are left out.
        misaligned: whether visits whose registration is in doubt (column ``aligned`` of ``visits.csv``) are left out
            (``drop``) or used (``keep``); prediction takes them all.
        missing_channels: whether visits that lack some of the folder's channels are left out (``drop``), or used with
            these channels at 0 (``keep``).
        **options: those of :class:`PairDataModule`.
    """

    def __init__(
        self,
        root: str | Path,
        table: str | Path | None = None,
        common_frame: bool | None = None,
        cache_gb: float = 0.0,
        exclude: Sequence[str] = (),
        misaligned: Literal["drop", "keep"] = "drop",
        missing_channels: Literal["drop", "keep"] = "drop",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.partial = keeps_partial(missing_channels)
        if not is_prepared(root):
            raise InputError(
                f"{root} is no folder that `lssl prepare` wrote: it lacks visits.csv or dataset.json; read NIfTI files "
                f"with NiftiDataModule."
            )
        self.root, self.csv = Path(root), Path(root) / "visits.csv" if table is None else Path(table)
        self.common_frame = self._in_template() if common_frame is None else common_frame
        self.exclude, self.misaligned = tuple(exclude), misaligned
        self._budget = int(cache_gb * 1e9 / max(1, self.num_workers))

    def _in_template(self) -> bool:
        return bool(prepared_options(self.root).get("template"))

    @property
    def location(self) -> str:
        """The folder, or the table if one is given."""
        return str(self.root if self.csv == self.root / "visits.csv" else self.csv)

    def visit_table(self) -> pd.DataFrame:
        """One row per visit, with the path and the size of its file."""
        table, notes = csv_table(self.csv, self.root, {*WANTED, *(name.lower() for name in self.target_sources)})
        self.notes += notes
        if table.empty:
            raise InputError(f"{self.csv} lists no visits; run `lssl prepare` again.")
        table = with_sizes(table, self.csv)
        table = self._with_channels(table)
        self.notes.append(f"prepared channels {', '.join(self._channels)}")
        table = self._usable(table)
        if "flags" in table and (flagged := int(table["flags"].fillna("").astype(bool).sum())):
            self.notes.append(f"{count(flagged, 'visit')} to look at, see the column flags of visits.csv")
        return table

    def _with_channels(self, table: pd.DataFrame) -> pd.DataFrame:
        """Drops visits that lack channels, unless they are kept, and counts and names them."""
        order = prepared_options(self.root).get("suffixes", [])
        self._channels, present = prepared_channels(table, order, self.partial)
        if present is None or self.partial:
            return table
        lacking = pd.Series(~present.all(1), table.index)
        if lacking.all():
            kinds = " and ".join(table["channels"].unique()[:3])
            raise InputError(
                f"The visits of {self.csv} have different channels ({kinds}), and none has all; choose rows of one "
                f"kind, or set data.init_args.missing_channels to keep."
            )
        names = name_visits(table.loc[lacking])
        self.excluded.append(f"{count(int(lacking.sum()), 'visit')} that lack channels ({names})")
        return table.loc[~lacking].reset_index(drop=True)

    def _usable(self, table: pd.DataFrame) -> pd.DataFrame:
        """Drops visits that are excluded, missing, known to be damaged, or misaligned, and counts and names them."""
        table, excluded = without_visits(table, self.exclude)
        problems = known_problems(table["image"], "stored")
        sizes = zip(table["image"], table[list(SIZES)].to_numpy().tolist(), strict=True)
        problems |= unopenable({path: size for path, size in sizes if path not in problems})
        table, broken = leave_out(table, problems)
        self.excluded += excluded + broken
        if "aligned" in table and self.misaligned == "drop" and not self.predicting:
            doubted = table[table["aligned"].fillna("True").astype(str) == "False"]
            reasons = doubted["flags"].fillna("") if "flags" in table else pd.Series("", doubted.index)
            if len(table) == len(doubted) > 0:
                first = f"{doubted['subject'].iloc[0]} {doubted['session'].iloc[0]}: {reasons.iloc[0]}"
                raise InputError(
                    f"All {count(len(table), 'visit')} of {self.root} are misaligned ({first}); look at "
                    f"{self.root / 'pictures'}. --data.init_args.misaligned keep uses them as they are."
                )
            table, phrases = leave_out(table, dict(zip(doubted["image"], reasons, strict=True)))
            self.excluded += [phrase.replace("that cannot be read", "misaligned", 1) for phrase in phrases]
        return table

    def inspect(self, table: pd.DataFrame) -> None:
        """Keeps the files and shapes of the sorted table."""
        self.files = VisitFiles(table["image"].tolist(), self._budget)
        self._shapes = table[list(SIZES)].to_numpy(int)
        names = table["field"].fillna("").astype(str).tolist() if "field" in table else [""] * len(table)
        _, self._present = prepared_channels(table, self._channels, self.partial)
        self._fields = np.array([os.fsencode(self.root / name) if name else b"" for name in names])

    def channels(self) -> list[str]:
        """Channels of the prepared folder, in stored order."""
        self.setup()
        return self._channels

    def present(self) -> np.ndarray | None:
        """``(visits, C)`` bool, from the table."""
        return self._present

    def shapes(self) -> np.ndarray:
        """``(visits, 3)`` voxels per axis, from the table."""
        return self._shapes

    def voxel_sizes(self) -> np.ndarray:
        """``(visits, 3)`` mm, those of the first visit: a folder is prepared at one spacing."""
        return np.tile(np.linalg.norm(self.files.open(0).affine[:3, :3], axis=0), (len(self.table), 1))

    def has_label(self) -> np.ndarray:
        """``(visits,)`` bool, from the files' metadata."""
        return np.array([self.files.open(row).labelled for row in range(len(self.table))])

    def read(self, row: int) -> Visit:
        """The whole visit in a row of the table."""
        return self.read_visits((row,), None, None)[0]

    def use_motion(self) -> None:
        """See :meth:`PairDataModule.use_motion`."""
        self.setup()
        without = int((self._fields == b"").sum())
        if without == len(self._fields):
            raise InputError(
                f"views.correspondence is field, and {self.root} has no fields between visits; run `lssl prepare "
                f"--nonrigid`, or leave views.correspondence at rigid."
            )
        if missing := sorted({path for path in self._fields if path and not os.path.exists(path)}):
            raise InputError(
                f"{os.fsdecode(missing[0])} does not exist; run `lssl prepare --nonrigid` again to restore it."
            )
        if without:
            rank_zero_info(f"{count(without, 'visit')} without a field; where its tissue lies, the frame tells.")
        self.moving = True

    def moved(self, points: np.ndarray, row: int, other: int) -> np.ndarray:
        """See :meth:`PairDataModule.moved`: through the mean of the subject's visits, by their fields."""
        here, there = self._fields[row], self._fields[other]
        if not here or not there:
            return points
        middle = moved_by(points, _field(os.fsdecode(here)), "from_visit")
        return moved_by(middle, _field(os.fsdecode(there)), "to_visit")

    def reader(self) -> PairDataModule:
        """Also drops the table and the names: workers need only the flat arrays."""
        reader = super().reader()
        reader.table, reader.subjects = pd.DataFrame(), []
        return reader

    def read_visits(
        self, rows: Sequence[int], size: tuple[int, int, int] | None, seed: int | None
    ) -> tuple[Visit, ...]:
        """Reads the same box of visits, and nothing else of them."""
        stored = {row: self.files.open(row) for row in dict.fromkeys(rows)}
        start, cut = [0, 0, 0], list(stored[rows[0]].shape)
        if size is not None:
            start, cut = around(_centre([stored[row] for row in rows], seed), size, cut)
        names = None if self._present is None else self._channels
        read = {row: _visit(visit, start, cut, names) for row, visit in stored.items()}
        return tuple(read[row] for row in rows)


class VisitFiles:
    """The files of a prepared folder. Paths are flat bytes, so that workers share them without copying.

    A file is opened anew for each box, which takes a tenth of a millisecond. With a budget, the compressed bytes of the
    first visits are cached until the budget is spent. Nothing is evicted, because every epoch visits all subjects.

    Args:
        paths: of the visits, in the order of the table.
        budget: bytes that this process may keep in memory.
    """

    def __init__(self, paths: Sequence[str], budget: int = 0) -> None:
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.budget = budget
        self.kept: dict[int, bytes] = {}
        self._spent = 0

    def open(self, row: int) -> StoredVisit:
        """The visit of a row, from memory if it is cached."""
        path = os.fsdecode(self._paths[row])
        if self.budget <= 0:
            return read_stored(path)
        frame = self.kept.get(row)
        if frame is None and self._spent < self.budget:
            try:
                frame = Path(path).read_bytes()
            except OSError:
                return read_stored(path)  # raises with the reason
            if self._spent + len(frame) <= self.budget:
                self.kept[row] = frame
                self._spent += len(frame)
        return read_stored(path, frame)


@lru_cache(maxsize=2)
def _field(path: str) -> VisitField:
    """The fields of a visit; a pair needs those of both, there and back."""
    return read_field(path)


def _centre(visits: Sequence[StoredVisit], seed: int | None) -> list[int]:
    """A random foreground voxel of any visit, or the middle of the bounding box of all foregrounds."""
    if seed is None:
        low, high = np.min([visit.bounds[0] for visit in visits], 0), np.max([visit.bounds[1] for visit in visits], 0)
        return ((low + high) // 2).tolist()
    generator = torch.Generator().manual_seed(seed)
    places = np.concatenate([visit.places for visit in visits])
    if not len(places):
        return [int(torch.randint(length, (1,), generator=generator)) for length in visits[0].shape]
    return places[int(torch.randint(len(places), (1,), generator=generator))].tolist()


def _visit(stored: StoredVisit, start: Sequence[int], size: Sequence[int], channels: list[str] | None) -> Visit:
    """A box; of visits that may lack some of the ``channels``, with zeros there."""
    image, foreground, label = stored.box(start, size)
    present = None
    if channels is not None and stored.channels != channels:
        own, image = image, np.zeros((len(channels), *image.shape[1:]), image.dtype)
        image[[channels.index(name) for name in stored.channels]] = own
        present = torch.tensor([name in stored.channels for name in channels])
    affine = torch.from_numpy(stored.affine).clone()
    affine[:3, 3] += affine[:3, :3] @ torch.tensor(start, dtype=affine.dtype)
    return Visit(
        image=torch.from_numpy(image),
        affine=affine,
        foreground=torch.from_numpy(foreground),
        label=None if label is None else torch.from_numpy(label),
        present=present,
    )
