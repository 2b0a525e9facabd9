"""What ``lssl inspect`` finds by reading files: images that cannot be used, and defects of masks and label maps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lssl.data.nifti import Grid, read_grid
from lssl.data.pairs import count, visit_name
from lssl.data.usable import check_files, known_problems
from lssl.prepare.cohort import add_overlays
from lssl.utils.errors import InputError

__all__ = ["Finding", "inspect_overlays", "unusable"]

Finding = tuple[str, str]


def unusable(table: pd.DataFrame, column: str, kind: str, read: bool = True) -> list[Finding]:
    """Reads files of a column once; the visits whose file cannot be used, with the reason.

    Args:
        table: the visits.
        column: of paths; empty ones are skipped.
        kind: what the files hold, see :func:`lssl.data.usable.check_files`.
        read: otherwise, only what is known from an earlier reading is told.
    """
    paths = table[column].astype(str).tolist()
    wanted = {row: path for row, path in enumerate(paths) if path}
    present = [path for path in wanted.values() if read or Path(path).exists()]  # headers tell which files are missing
    problems = check_files(present, kind, _say) if read else known_problems(present, kind)
    return [(visit_name(table, row), problems[path]) for row, path in wanted.items() if path in problems]


def inspect_overlays(
    folder: Path, table: pd.DataFrame, grids: list[Grid | None]
) -> tuple[dict[str, str], list[Finding], list[str], dict[str, list[str]]]:
    """Masks and label maps of a cohort, all of which are read: how many there are, and what is wrong with them.

    Args:
        folder: the BIDS folder, or that of the table.
        table: the visits; its columns mask and label are filled in as ``lssl prepare`` would.
        grids: of the images.

    Returns:
        Words on the masks and on the label maps, findings by visit, remarks, and by option the patterns that choose
        among files of which none was taken.
    """
    notes, choices = add_overlays(folder, table)
    words: dict[str, str] = {}
    found: list[Finding] = []
    for column in ("mask", "label"):
        paths = table[column].tolist()
        users = {path: paths.count(path) for path in set(paths) if path}
        other = 0
        for row, path in enumerate(paths):
            if not path:
                continue
            wrong = _off_grid(path, grids[row])
            other += bool(wrong)
            found += [(visit_name(table, row), wrong)] if wrong else []
        shared = sum(number > 1 for number in users.values())
        parts = [f"{count(sum(map(bool, paths)), 'visit')} of {len(paths)}"]
        parts += [f"{other} on another grid than the image or unreadable"] * (other > 0)
        parts += [f"{count(shared, 'file')} for several visits of a subject"] * (shared > 0)
        words[column] = ", ".join(parts)
        found += unusable(table, column, column)
    return words, list(dict.fromkeys(found)), notes, choices


def _say(text: str) -> None:
    """Beside the report, which may be JSON."""
    print(text, file=sys.stderr)


def _off_grid(path: str, grid: Any) -> str:
    """What is wrong with the place of a mask or label map, by its header; empty if nothing is."""
    try:
        own = read_grid(path)
    except InputError as error:
        return str(error)
    if grid is None or own.same(grid):
        return ""
    apart = "" if not np.array_equal(own.shape, grid.shape) else f", up to {own.distance(grid):.3g} mm off"
    return f"{path} lies on another grid than the image{apart}: `lssl prepare` resamples it, `lssl fit` refuses it"
