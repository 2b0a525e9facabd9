"""What happens when a visit cannot be read during a run: the run stops, or the pair is skipped, listed and counted.

Start-up checks find what is wrong with files beforehand (:mod:`lssl.data.usable`). A file may still be damaged later,
or a network drive may fail. ``on_error: skip`` then draws another pair of the **same** subject, by the item's own seed,
so the draw depends on neither workers nor history. If no pair can be read, a visit is paired with itself, as subjects
with one visit are (``single_visits: same``). A subject without any readable pair is left out of the batch, and a batch
without pairs is passed over. In evaluation, a pair is left out and not replaced.

A method that needs a number of pairs (batch norm in its heads) may refuse a smaller batch.

Several devices need equally many pairs each, so there a pair is replaced, but never left out: the run stops.
"""

from __future__ import annotations

import csv
import io
import os
import pickle
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader

from lssl.data.batch import PairBatch, Visit, collate
from lssl.utils.errors import InputError
from lssl.utils.files import writing_failed

__all__ = ["FAILURES", "FilledLoader", "SkipList", "collate_readable", "other_pairs", "read_error", "skipped_reads"]

#: What reading a file may raise; anything else is a bug and keeps its traceback.
FAILURES = (InputError, OSError, EOFError, zlib.error, pickle.UnpicklingError)
COLUMNS = ("visits", "why", "instead")


def read_error(error: Exception, visits: str) -> InputError:
    """A reader's exception as one sentence, which names the file or else the visits."""
    if isinstance(error, InputError):
        return error if os.sep in str(error) else InputError(f"{visits}: {error}")
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{visits} cannot be read ({reason}); restore the file, or leave the visit out with exclude.")


def other_pairs(
    pairs: np.ndarray, subject: np.ndarray, rows: tuple[int, ...], seed: int, same_visit: bool = False
) -> list[tuple[int, ...]]:
    """The other pairs of a pair's subject, in an order drawn by a seed; of a series, the other series.

    Args:
        pairs: ``(pairs, 2)`` rows of the visit table.
        subject: ``(visits,)`` number of each row's subject.
        rows: visits of the pair.
        seed: of the item.
        same_visit: each visit with itself comes last.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(found: np.ndarray) -> list[tuple[int, ...]]:
        order = torch.randperm(len(found), generator=generator)
        return [tuple(visits) for visits in found[order.numpy()].tolist()]

    own = np.unique(pairs[subject[pairs[:, 0]] == subject[rows[0]]], axis=0)
    others = drawn(own[(own != rows).any(1)])
    alone = drawn(np.repeat(np.unique(own)[:, None], 2, axis=1)) if same_visit else []
    return [*others, *(pair for pair in alone if pair not in others and pair != rows)]


class SkipList:
    """Lists skipped pairs in a file of the run folder, from any worker, and says so on standard error.

    Args:
        folder: the run folder; ``None`` lists nothing.
        same_visit: whether a visit may be paired with itself.
    """

    def __init__(self, folder: str | Path | None, same_visit: bool = False) -> None:
        self.same_visit = same_visit
        together = distributed.is_available() and distributed.is_initialized()
        self.alone = not together or distributed.get_world_size() == 1
        self.path = None if folder is None else _list_of(Path(folder), distributed.get_rank() if together else 0)
        self._said: set[str] = set()

    def add(self, visits: str, error: InputError, instead: str) -> None:
        """Adds a row, in one write, so that rows of several workers do not mix."""
        if str(error) not in self._said:
            self._said.add(str(error))
            print(f"lssl: {visits} skipped: {error} Read instead: {instead}.", file=sys.stderr, flush=True)
        if self.path is None:
            return
        try:
            self._write(self.path, _line(visits, str(error), instead))
        except OSError as failure:  # said here: a worker's error loses its number on the way
            if mistake := writing_failed(self.path, failure):
                raise mistake from failure
            raise

    @staticmethod
    def _write(path: Path, row: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        try:
            file = os.open(path, flags | os.O_EXCL, 0o666)
            row = _line(*COLUMNS) + row
        except FileExistsError:
            file = os.open(path, flags, 0o666)
        try:
            os.write(file, row)
        finally:
            os.close(file)


def skipped_reads(folder: str | Path) -> list[list[str]]:
    """Rows ``visits, why, instead`` of the pairs that a run has skipped on all its ranks."""
    rows = []
    for path in sorted(Path(folder).glob("skipped_reads*.csv")):
        with path.open(newline="") as file:
            rows += [row for row in csv.reader(file) if row and tuple(row) != COLUMNS]
    return rows


def _list_of(folder: Path, rank: int) -> Path:
    return folder / (f"skipped_reads.rank{rank}.csv" if rank else "skipped_reads.csv")


def _line(*cells: str) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerow(cells)
    return text.getvalue().encode()


def collate_readable(pairs: Sequence[tuple[Visit, ...] | None]) -> PairBatch | None:
    """A batch of the pairs that could be read; ``None`` if there is none, which Lightning's training passes over."""
    readable = [pair for pair in pairs if pair is not None]
    return collate(readable) if readable else None


class FilledLoader(DataLoader):
    """For evaluation: batches without pairs do not occur."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return (batch for batch in super().__iter__() if batch is not None)
