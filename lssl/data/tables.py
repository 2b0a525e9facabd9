"""Visit tables from a CSV, a TSV or a single file.

Each gives one row per visit with the columns ``subject``, ``session``, ``age`` (years), ``time`` (years since the
subject's first visit), ``image``, ``mask`` and ``label`` (paths, or empty), as :mod:`lssl.data.bids` does.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lssl.data.pairs import count
from lssl.data.partial import with_reference
from lssl.data.selection import entities
from lssl.data.sidecars import MISSING, normal_id, read_text
from lssl.data.times import Measures, add_times, family, read_measures
from lssl.utils.errors import InputError

__all__ = ["SIZES", "csv_table", "file_table", "quality_table", "with_sizes"]

SIZES = ("size_d", "size_h", "size_w")  # columns of a prepared visit
LARGEST = 1e5  # voxels along an axis


def file_table(path: str | Path) -> pd.DataFrame:
    """The one visit of a single file, NIfTI or MGH; subject and session are taken from a BIDS name."""
    name = Path(path).name
    if not name.endswith((".nii", ".nii.gz", ".mgz", ".mgh")):
        raise InputError(f"{path} is no image; give one that ends in .nii, .nii.gz, .mgz or .mgh, or a folder.")
    found = entities(name)
    subject, session = (f"{key}-{found[key]}" if key in found else "" for key in ("sub", "ses"))
    row = {
        "subject": subject or re.split(r"\.nii|\.mg", name)[0],
        "session": session,
        "image": str(path),
        "mask": "",
        "label": "",
    }
    return pd.DataFrame([{**row, "age": np.nan, "time": 0.0}])


def csv_table(
    path: str | Path,
    root: str | Path | None = None,
    columns: Collection[str] | None = None,
    suffixes: Sequence[str] = ("T1w",),
    partial: bool = False,
) -> tuple[pd.DataFrame, list[str]]:
    """The visits of a CSV (or TSV, by its ending).

    Columns: ``subject``, ``session``, ``image``; one or more of ``age`` (years), ``days`` (since any fixed day of the
    subject) and ``date`` (YYYY-MM-DD), which may be empty; optionally ``mask``, ``label``, ``site``, ``split``. Blanks
    around cells are ignored. Instead of ``image`` there may be one column per channel, named like its suffix (``T1w``,
    ``FLAIR``, in any case).

    Args:
        path: the table.
        root: folder that relative paths start from; by default the folder of the table.
        columns: the columns to read; ``None`` reads all.
        suffixes: of the channels; the first one may be named ``image``.
        partial: keeps lines without some of the channels, see :func:`lssl.data.partial.with_reference`.

    Returns:
        The table, with the images of further channels in ``image_1``, ``image_2``, …; and notes on what was odd.
    """
    path = Path(path)
    table, notes = _read_csv(path, columns, suffixes, partial)
    if "split" in table:
        table["split"] = table["split"].str.lower()
    folder = os.fspath(path.parent if root is None else root)
    channels = [name for name in table if re.fullmatch(r"image_\d+", str(name))]
    for column in ("image", *channels, "mask", "label"):
        paths = table[column].fillna("").tolist() if column in table else []
        table[column] = [name and os.path.join(folder, name) for name in paths] or ""
    same = pd.Series([os.path.normpath(name) for name in table["image"]])
    repeated = np.flatnonzero(same.duplicated())
    if len(repeated):
        second = int(repeated[0])
        first = int((same == same.iat[second]).to_numpy().argmax())
        lines = [table.index[row] + 2 for row in (first, second)]
        raise InputError(
            f"Duplicate visit: lines {lines[0]} and {lines[1]} of {path} name the same image, "
            f"{table['image'].iat[second]}; keep one line per visit."
        )
    table = table.reset_index(drop=True)
    measures = Measures.empty(len(table))
    read_measures(measures, table, path.name)
    kinds = [name for name in table if family(str(name))[0] in ("age", "elapsed", "date", "baseline_age")]
    table, odd = add_times(table.drop(columns=kinds), measures)
    return table, notes + odd


def with_sizes(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """A table of prepared visits with the columns :data:`SIZES` as whole numbers.

    Args:
        table: of text.
        path: where it is from.

    Raises:
        InputError: if a column is missing, or a size is no whole and positive number.
    """
    if missing := [name for name in SIZES if name not in table]:
        folder = path.parent / "visits.csv"
        raise InputError(f"The table {path} lacks the columns {', '.join(missing)}; make it from the rows of {folder}.")
    sizes = table[list(SIZES)].apply(pd.to_numeric, errors="coerce").to_numpy(float)
    bad = ~((sizes >= 1) & (sizes < LARGEST) & (sizes == np.floor(sizes))).all(axis=1)
    if bad.any():
        row = table.iloc[int(bad.argmax())]
        size = "×".join(str(row[name])[:20] for name in SIZES)
        raise InputError(
            f"{path}: the size of {row['subject']} {row['session']} is {size}; give whole numbers of voxels, or run "
            "`lssl prepare` again."
        )
    return table.assign(**dict(zip(SIZES, sizes.astype(int).T, strict=True)))


def quality_table(path: Path) -> pd.DataFrame:
    """The figures that ``lssl prepare`` has written of each visit."""
    try:
        table = pd.read_csv(path, dtype={"subject": str, "session": str})
        if lacking := {"subject", "session", "spacing", "raw_high", "bytes", "foreground", "labelled"} - {*table}:
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
        table = table.astype(dict.fromkeys(("spacing", "raw_high", "bytes"), float))
        return table.drop_duplicates(["subject", "session"])
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is missing or damaged ({' '.join(str(error).split())[:100]}); run `lssl prepare` again."
        ) from error


def _read_csv(
    path: Path, columns: Collection[str] | None, suffixes: Sequence[str], partial: bool
) -> tuple[pd.DataFrame, list[str]]:
    """A table as text with lower-case column names; empty and incomplete lines are left out and noted."""
    if not os.path.lexists(path):
        raise InputError(f"The table {path} does not exist; correct its path.")
    text = read_text(path)
    header = text.split("\n", 1)[0]
    separator = "\t" if path.suffix == ".tsv" else ";" if ";" in header and "," not in header else ","
    try:
        table = pd.read_csv(
            io.StringIO(text),
            sep=separator,
            dtype=str,
            index_col=False,
            usecols=None if columns is None else lambda name: str(name).strip().lower() in columns,
        )
    except (ValueError, pd.errors.ParserError) as error:  # what pandas raises for empty and ragged files
        reason = " ".join(str(error).split())
        raise InputError(
            f"The table {path} cannot be read ({reason}); write it as a CSV with a header line."
        ) from error
    table.columns = pd.Index([str(column).strip().lower() for column in table.columns])
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise InputError(f"The table {path} has the column {twice[0]} twice; keep one.")
    table = _name_channels(table, suffixes, path)
    missing = [column for column in ("subject", "session", "image") if column not in table]
    if missing:
        raise InputError(
            f"The table {path} lacks the {'column' if len(missing) == 1 else 'columns'} {', '.join(missing)}; "
            f"it has {', '.join(table.columns)}."
        )
    for column in table:
        table[column] = _without_blanks(table[column])
    return _complete(table, path, suffixes, partial)


def _without_blanks(cells: pd.Series) -> pd.Series:
    """Text without blanks around it, NaN where it says nothing; each different text is looked at once."""
    codes, texts = pd.factorize(cells.astype("object"))
    stripped = [text.strip() for text in texts]
    known = np.array([*(np.nan if text.lower() in MISSING else text for text in stripped), np.nan], dtype=object)
    return pd.Series(known[codes], cells.index, dtype=object)  # the code of an empty cell is -1


def _name_channels(table: pd.DataFrame, suffixes: Sequence[str], path: Path) -> pd.DataFrame:
    """Renames the columns of the channels to ``image``, ``image_1``, …; refuses a table that lacks one."""
    first, *others = [suffix.lower() for suffix in suffixes]
    lacking = [suffix for suffix in suffixes[1:] if suffix.lower() not in table]
    if lacking:
        raise InputError(
            f"The table {path} has no column {lacking[0]}, but suffix asks for {', '.join(suffixes)}; "
            f"add a column with that channel's images, or leave it out of suffix."
        )
    named = {other: f"image_{number}" for number, other in enumerate(others, 1)}
    if first in table and ("image" not in table or others):
        table, named = table.drop(columns="image", errors="ignore"), {first: "image", **named}
    return table.rename(columns=named)


def _complete(
    table: pd.DataFrame, path: Path, suffixes: Sequence[str], partial: bool
) -> tuple[pd.DataFrame, list[str]]:
    """Drops the lines without a subject, a session or one of the images (if ``partial``: all of them); notes them."""
    notes = []
    named = {"image": suffixes[0], **{f"image_{number}": name for number, name in enumerate(suffixes) if number}}
    if partial:
        table = with_reference(table.fillna(dict.fromkeys(named, "")))
        table["image"] = table["image"].where(table["image"] != "")
        named = {"image": f"image of {' or '.join(suffixes)}"}
    for column in ("subject", "session", *named):
        empty, what = table[column].isna(), named.get(column, column) if len(suffixes) > 1 else column
        if empty.any():
            line = table.index[empty][0] + 2
            if empty.all():
                raise InputError(f"Line {line} of {path} has no {what}; fill it in or remove the line.")
            notes.append(f"{count(int(empty.sum()), 'line')} of {path.name} without {what}, the first being {line}")
            table = table[~empty]
    alike: dict[str, set[str]] = {}
    for name in table["subject"].unique():
        alike.setdefault(normal_id(name, "sub-"), set()).add(name)
    doubtful = [sorted(names) for names in alike.values() if len(names) > 1]
    if doubtful:
        notes.append(f"subjects {' and '.join(doubtful[0])} may be one person; they are taken as two")
    return table, notes
