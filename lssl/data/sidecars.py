"""Text tables and their JSON sidecars, in many encodings and spellings.

A file that is not a table raises an InputError that names it. A cell that cannot be understood does not: it is unknown,
and the caller lists it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lssl.utils.errors import InputError

__all__ = [
    "SESSION",
    "SUBJECT",
    "SidecarTable",
    "Value",
    "normal_id",
    "parse_date",
    "parse_number",
    "read_table",
    "read_text",
    "rows_by_id",
    "unit_in_years",
]

DAYS_PER_YEAR = 365.25
#: Columns that name the subject and the visit.
SUBJECT, SESSION = ("participant_id", "subject_id", "subject"), ("session_id", "session", "visit", "visit_id")
#: Cells that say that a value is unknown.
MISSING = {"", "n/a", "na", "nan", "none", "null", "n.a.", "-", "--", ".", "?", "unknown", "missing", "nat"}
#: Descriptions of a level (JSON sidecar) that say the same.
UNKNOWN_LEVEL = re.compile(r"missing|unknown|not (available|known|collected|applicable)|n/?a\b|refused|invalid")
UNITS = {
    1 / (24 * DAYS_PER_YEAR): ("h", "hr", "hrs", "hour", "hours"),
    1 / DAYS_PER_YEAR: ("d", "day", "days"),
    7 / DAYS_PER_YEAR: ("w", "wk", "wks", "week", "weeks"),
    1 / 12: ("m", "mo", "mos", "mon", "mth", "mths", "month", "months"),
    1.0: ("y", "yr", "yrs", "year", "years"),
}
YEARS = {name: years for years, names in UNITS.items() for name in names}


def unit_in_years(text: str) -> float | None:
    """Years per unit, ``months`` or ``mo`` → 1/12; ``None`` if the text names no unit of time."""
    words = re.findall(r"[a-z]+", text.lower())
    return next((YEARS[word] for word in words if word in YEARS), None)


@dataclass(frozen=True)
class Value:
    """A number of a table cell.

    Attributes:
        number: the value; the middle of a range, or the bound itself (``89+``).
        unit: in years, if the cell names one (``072Y``, ``18 months``).
        exact: false for ranges and bounds, which give no interval.
    """

    number: float
    unit: float | None = None
    exact: bool = True


def parse_number(text: str) -> Value | None:
    """``72``, ``72,5``, ``89+``, ``>89``, ``70-74``, ``072Y``, ``18 months``; ``None`` for anything else."""
    one = r"(\d+(?:[.,]\d*)?|[.,]\d+)"
    cell = text.strip().lower().replace("−", "-").replace("–", "-")
    pattern = rf"(?:([<>≥≤]=?|=)\s*)?(-?)\s*{one}(?:e([+-]?\d{{1,2}}))?\s*([a-z]*)\.?\s*(\+|plus)?"
    if found := re.fullmatch(pattern, cell):
        bound, sign, digits, power, unit, plus = found.groups()
        if unit == "plus":
            unit, plus = "", "+"
        if unit and unit not in YEARS:
            return None
        number = float(digits.replace(",", ".")) * 10.0 ** int(power or 0) * (-1 if sign else 1)
        return Value(number, YEARS.get(unit), exact=not plus and bound in (None, "="))
    if found := re.fullmatch(rf"{one}\s*(?:-|to)\s*{one}\s*([a-z]*)", cell):
        low, high = (float(found[i].replace(",", ".")) for i in (1, 2))
        if low <= high and (not found[3] or found[3] in YEARS):
            return Value((low + high) / 2, YEARS.get(found[3]), exact=False)
    return None


def parse_date(text: str) -> float | None:
    """Days of a date in the proleptic Gregorian calendar, years 1 to 9999; ``None`` if it is no date.

    ``2015-03-02``, with a time and a zone or without, ``20150302``, ``2015/03/02`` and ``02.03.2015``. ``03/02/2015``
    is ambiguous, so it is no date.
    """
    import datetime

    cell = re.sub(r"\s+", "T", text.strip()).replace("/", "-")
    if found := re.fullmatch(r"(\d{1,2})\.(\d{1,2})\.(\d{4})(T.*)?", cell):
        cell = f"{found[3]}-{int(found[2]):02}-{int(found[1]):02}{found[4] or ''}"
    if not re.match(r"\d{4}-?\d{2}-?\d{2}(T|$)", cell):
        return None
    cell = re.sub(r"(\.\d{6})\d+", r"\1", cell)
    try:
        moment = datetime.datetime.fromisoformat(cell)
    except ValueError:
        return None
    offset = moment.utcoffset()
    seconds = moment.hour * 3600 + moment.minute * 60 + moment.second - (offset.total_seconds() if offset else 0.0)
    return moment.toordinal() + seconds / 86400


def normal_id(text: str, prefix: str = "") -> str:
    """An id for comparison: without prefix, case and leading zeros, so that ``ses-01``, ``01`` and ``1`` are equal."""
    text = text.strip().lower()
    return re.sub(r"\d+", lambda digits: str(int(digits[0])), text.removeprefix(prefix))


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, UTF-16 (with or without its mark) or else Latin-1, with plain line ends."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        hint = " (a link whose content is not here; `datalad get` fetches it)" if os.path.islink(path) else ""
        raise InputError(f"{path} cannot be read: {error.strerror or error}{hint}.") from error
    text = None
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = raw.decode("utf-16", errors="replace")
    elif b"\0" in raw[:64]:
        text = raw.decode("utf-16-be" if raw[:1] == b"\0" else "utf-16-le", errors="replace")
    else:
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = raw.decode("cp1252", errors="replace")
    if "\0" in text:
        raise InputError(f"{path} is no text: it holds zero bytes; restore it, or write it as a table in UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


@dataclass
class SidecarTable:
    """A TSV beside the images, with the metadata of its JSON file.

    Attributes:
        path: of the TSV.
        rows: cells by lower-case column; unknown ones are left out.
        units: years of one unit, by column.
        notes: what was odd about the file.
    """

    path: Path
    rows: list[dict[str, str]] = field(default_factory=list)
    units: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_table(path: Path, *sidecars: Path) -> SidecarTable:
    """A TSV (or CSV, by its ending) and its JSON sidecars, later ones before earlier ones; a missing file has no rows.

    Column names become lower-case; blanks and quotes around cells are removed. Cells that mean "unknown" (``n/a``, and
    levels that the JSON describes so) are left out.
    """
    table = SidecarTable(path)
    if not os.path.lexists(path):
        return table
    described: dict[str, dict[str, Any]] = {}
    for sidecar in (*sidecars, path.with_suffix(".json")):
        described |= _described(sidecar, table.notes)
    unknown: dict[str, set[str]] = {}
    for column, content in described.items():
        unit = content.get("Units")
        if isinstance(unit, str) and (years := unit_in_years(unit)) is not None:
            table.units[column] = years
        levels = content.get("Levels")
        if isinstance(levels, dict):
            unknown[column] = {
                str(level).strip().lower() for level, text in levels.items() if UNKNOWN_LEVEL.search(str(text).lower())
            }
    try:
        commas = path.suffix.lower() == ".csv"
        kind: dict[str, Any] = {} if commas else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        lines = list(csv.reader(io.StringIO(read_text(path)), **kind))
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as a table ({error}); write it as tab-separated text.") from error
    header = [_cell(name).lower() for name in lines[0]] if lines else []
    for line in lines[1:]:
        cells = {name: _cell(text) for name, text in zip(header, line, strict=False) if name}
        cells = {
            name: text
            for name, text in cells.items()
            if text.lower() not in MISSING and text.lower() not in unknown.get(name, ())
        }
        if cells:
            table.rows.append(cells)
    return table


def rows_by_id(
    table: SidecarTable, columns: Sequence[str], prefix: str, known: set[str]
) -> dict[str, list[dict[str, str]]]:
    """Rows by subject or session as the folders spell them; ids match without prefix and leading zeros.

    Args:
        table: with the ids in one of its columns.
        columns: names that this column may have, :data:`SUBJECT` or :data:`SESSION`.
        prefix: ``sub-`` or ``ses-``.
        known: subjects or sessions as the folders spell them.
    """
    column = next((name for name in columns if any(name in row for row in table.rows)), None)
    alike: dict[str, list[str]] = {}
    for name in sorted(known):
        alike.setdefault(normal_id(name, prefix), []).append(name)
    found: dict[str, list[dict[str, str]]] = {}
    for row in table.rows if column else []:
        if not (text := row.get(str(column), "")):
            continue
        full = text if text.startswith(prefix) else prefix + text
        same = alike.get(normal_id(text, prefix), [])
        name = full if full in known else same[0] if len(same) == 1 else full
        found.setdefault(name, []).append(row)
    return found


def _cell(text: str) -> str:
    text = text.strip().strip("﻿")
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] == '"' else text


def _described(path: Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    """Columns that a JSON sidecar describes; a broken one is noted."""
    if not os.path.lexists(path):
        return {}
    try:
        content = json.loads(read_text(path))
    except (InputError, ValueError, RecursionError) as error:
        notes.append(f"{path} is no JSON and is not read ({' '.join(str(error).split())})")
        return {}
    if not isinstance(content, dict):
        return {}
    return {str(name).strip().lower(): value for name, value in content.items() if isinstance(value, dict)}
