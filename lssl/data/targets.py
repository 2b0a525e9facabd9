"""Targets: columns of tables that a task predicts, such as a diagnosis or a score, one value for each visit.

=================== =================================================================================================
source              where the column is
=================== =================================================================================================
``participants``    ``participants.tsv`` beside the visits: one value for all visits of a subject
``sessions``        ``sub-*/sub-*_sessions.tsv`` or ``sessions.tsv``: one value for each visit
``visits``          the table of visits itself; ``age`` is always there
a path              a TSV or CSV with a column of subjects (``participant_id``, ``subject``) and perhaps of sessions
=================== =================================================================================================

Names of columns are compared without case. Cells such as ``n/a`` are unknown, see :data:`lssl.data.sidecars.MISSING`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lssl.data.bids import session_tables
from lssl.data.pairs import visit_name
from lssl.data.sidecars import MISSING, SESSION, SUBJECT, SidecarTable, parse_number, read_table, rows_by_id
from lssl.utils.errors import InputError

__all__ = ["Target", "encode", "read_targets"]


@dataclass(frozen=True)
class Target:
    """One column, as numbers.

    Attributes:
        name: of the column.
        source: where it was read.
        values: ``(visits,)`` float32: the number, or the place of the text in ``levels``; NaN where unknown.
        levels: the different values as text, in order: numbers by size, texts by the alphabet.
        numeric: whether every known value is a number.
    """

    name: str
    source: str
    values: np.ndarray
    levels: tuple[str, ...]
    numeric: bool

    def texts(self) -> np.ndarray:
        """``(visits,)`` the levels; NaN where unknown."""
        levels = np.array([*self.levels, np.nan], dtype=object)
        values = [self.value_of(level) for level in self.levels]
        place = (
            np.searchsorted(np.array(values, np.float32), self.values) if values else np.zeros(len(self.values), int)
        )
        return levels[np.where(np.isnan(self.values), len(self.levels), place)]

    def value_of(self, level: str) -> float:
        """The value of a level, as ``values`` holds it; NaN for a text that the column does not have."""
        if self.numeric:
            number = _number(level)
            return float("nan") if number is None else float(np.float32(number))
        return float(self.levels.index(level)) if level in self.levels else float("nan")


def read_targets(table: pd.DataFrame, sources: Mapping[str, str], location: str) -> dict[str, Target]:
    """Reads every target of a cohort.

    Args:
        table: sorted visits.
        sources: name of a column → its source, see the module's table.
        location: file or folder of the visits.
    """
    folder = Path(location) if Path(location).is_dir() else Path(location).parent
    return {name: encode(name, source, _cells(table, name, source, folder)) for name, source in sources.items()}


def encode(name: str, source: str, cells: pd.Series) -> Target:
    """Numbers of a column of texts (or numbers).

    Args:
        name: of the column.
        source: of it.
        cells: ``(visits,)``, NaN where unknown.
    """
    codes, found = pd.factorize(cells.astype(object))
    texts = [str(text).strip() for text in found]
    numbers = [_number(text) for text in texts]
    if texts and all(number is not None for number in numbers):
        values = np.array([*map(float, numbers), np.nan], np.float32)  # type: ignore[arg-type]
        levels = tuple(
            str(number).removesuffix(".0") for number in np.unique(values[:-1])
        )  # the shortest that is exact
        return Target(name, source, values[codes], levels, True)
    levels = tuple(sorted(set(texts)))
    places = np.array([*map(levels.index, texts), np.nan], np.float32)
    return Target(name, source, places[codes], levels, False)


def _number(text: str) -> float | None:
    """Of a plain number; a bound, a range or a quantity with a unit is a text."""
    try:
        number = float(text)
        return number if np.isfinite(number) else None
    except ValueError:
        value = parse_number(text)
    return value.number if value and value.exact and value.unit is None else None


def _cells(table: pd.DataFrame, name: str, source: str, folder: Path) -> pd.Series:
    column = name.strip().lower()
    if source == "visits":
        known = {str(each).lower(): each for each in table}
        if column not in known:
            raise InputError(
                f"targets: the table of visits has no column '{name}'; it has {', '.join(map(str, table))}."
            )
        return _known(table[known[column]])
    if source == "sessions":
        tables = [each for each in session_tables(folder, table) if each[1].rows]
        where = f"sub-*_sessions.tsv and no sessions.tsv in {folder}"
    else:
        path = folder / "participants.tsv" if source == "participants" else Path(source)
        if source != "participants" and path.suffix.lower() not in (".tsv", ".csv"):
            raise InputError(
                f"targets: {name} is to be read from '{source}'; give participants, sessions, visits, or the path of a "
                f"TSV or CSV."
            )
        tables = [("", read_table(path))] if path.is_file() else []
        where = str(path)
    if not tables:
        raise InputError(
            f"targets: {name} is to be read from {source}, but there is no {where}; give the path of the table, as in "
            f"{{{name}: /data/bids/participants.tsv}}."
        )
    found: dict[int, str] = {}
    for subject, sidecar in tables:
        found |= _of_table(table, sidecar, subject, column)
    cells = pd.Series([found.get(row, np.nan) for row in range(len(table))], dtype=object)
    if cells.isna().all():
        columns = sorted({key for _, sidecar in tables for row in sidecar.rows for key in row})
        raise InputError(
            f"targets: '{name}' is known for no visit in {tables[0][1].path}; the table's columns with values are "
            f"{', '.join(columns)}."
        )
    return cells


def _of_table(table: pd.DataFrame, sidecar: SidecarTable, subject: str, column: str) -> dict[int, str]:
    """Row of the visit table → cell. A table of one subject names no subjects."""
    groups = {str(name): places for name, places in table.groupby("subject", sort=False).indices.items()}
    rows = {subject: sidecar.rows} if subject else rows_by_id(sidecar, SUBJECT, "sub-", set(groups))
    found: dict[int, str] = {}
    for name, mine in rows.items():
        places = [int(place) for place in groups.get(name, [])]
        if any(key in row for row in mine for key in SESSION):
            labels = [str(table["session"].iat[place]) for place in places]
            by_session = rows_by_id(SidecarTable(sidecar.path, mine), SESSION, "ses-", set(labels))
            cells = [by_session.get(label, []) for label in labels]
        else:
            cells = [mine] * len(places)
        for place, own in zip(places, cells, strict=True):
            texts = list(dict.fromkeys(row[column] for row in own if column in row))
            if len(texts) > 1:
                raise InputError(
                    f"targets: {sidecar.path} has {' and '.join(texts[:3])} as {column} of "
                    f"{visit_name(table, place)}; keep one, or give a column of sessions."
                )
            if texts:
                found[place] = texts[0]
    return found


def _known(cells: pd.Series) -> pd.Series:
    """Without blanks and words for unknown."""
    texts = cells.astype(object)
    unknown = texts.isna() | texts.astype(str).str.strip().str.lower().isin(list(MISSING))
    return texts.mask(unknown, np.nan)
