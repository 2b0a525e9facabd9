"""Ages and times of visits from the tables and labels of a cohort, in a fixed order of trust.

For each subject, times come from the first of :data:`SOURCES` that knows all its visits, or else from the first that
knows any. Contradictions of other sources are reported with both values, and odd cells are listed. Neither refuses a
cohort.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from lssl.data.labels import label_time, label_years, visit_ranks
from lssl.data.pairs import count, visit_name
from lssl.data.sidecars import DAYS_PER_YEAR, MISSING, YEARS, parse_date, parse_number

__all__ = ["Measures", "add_times", "family", "read_measures"]

#: Sources of times, the most trusted first.
SOURCES = {
    "elapsed": "the time since the baseline",
    "date": "the date",
    "scan_date": "acq_time in scans.tsv",
    "age": "the age",
    "label": "the session label",
    "whole_age": "the age in whole years",
}
OLDEST = 130.0  # years, of all ages wherever they are read
MENTIONED = 10  # examples in a note

_UNIT = "(?:_?(?:in_)?(?P<unit>days?|weeks?|months?|years?|yrs?|mos?))?"
_WHEN = "(?:scan|visit|session|mri|acquisition|imaging|exam)"
FAMILIES = {
    "baseline_age": rf"(?:baseline|entry|enrol\w*)_age{_UNIT}"
    rf"|age_(?:at_)?(?:baseline|bl|entry|enrol\w*|screening|first_{_WHEN}){_UNIT.replace('unit', 'unit2')}",
    "age": rf"(?:(?:{_WHEN}|exact|chronological|subject|participant)_)?age(?:_(?:at|of)_(?:the_)?{_WHEN})?{_UNIT}",
    "elapsed": r"(?:(?:time|interval|delay)_)?(?:in_)?(?P<unit>days|weeks|months|years)"
    r"(?:_(?:since|from|after)_(?:the_)?(?:baseline|bl|first\w*|start|entry|enrol\w*|inclusion)|_bl)?",
    "timed": r"(?:time|interval|delay)(?:_(?:since|from|after)_\w+)?",  # with a unit in the sidecar only
    "date": rf"(?:(?:{_WHEN}|acq|study)_?)?date(?:_?time)?(?:_of_(?:the_)?{_WHEN})?|acq(?:uisition)?_time|datetime",
}


def family(column: str) -> tuple[str, float | None]:
    """Meaning of a column (``age``, ``baseline_age``, ``elapsed``, ``timed``, ``date`` or empty), its unit in years."""
    name = re.sub(r"[^a-z0-9]+", "_", column.lower()).strip("_")
    for kind, pattern in FAMILIES.items():
        if found := re.fullmatch(pattern, name):
            unit = next((value for value in found.groupdict().values() if value), None)
            return kind, YEARS.get(unit) if unit else None
    return "", None


@dataclass
class Measures:
    """Numbers of V visits, NaN where unknown.

    Attributes:
        values: ``(V,)`` each: ``age`` and ``baseline_age`` in years, ``elapsed`` in years since a fixed day of the
            subject, ``date`` and ``scan_date`` in days of the calendar.
        exact: ``(V,)`` bool, whether the age is a number rather than a bound or range.
        odd: values that could not be used, as ``(row, text)``.
        notes: further remarks.
    """

    values: dict[str, np.ndarray]
    exact: np.ndarray
    odd: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls, visits: int) -> Measures:
        """All unknown."""
        names = ("age", "baseline_age", "elapsed", "date", "scan_date")
        return cls({name: np.full(visits, np.nan) for name in names}, np.ones(visits, dtype=bool))


def read_measures(
    measures: Measures, cells: pd.DataFrame, where: str, units: Mapping[str, float] | None = None, scans: bool = False
) -> None:
    """Fills in values of visits that are not known yet from the columns of a table.

    Args:
        measures: of the V visits.
        cells: V rows of text, unknown ones missing.
        where: name of the table in messages.
        units: column → its unit in years, from a JSON sidecar.
        scans: whether dates are those of single scans.
    """
    for column in cells.columns:
        kind, named = family(str(column))
        unit = (units or {}).get(str(column), named)
        if kind == "timed":
            kind = "elapsed" if unit is not None else ""
        if not kind:
            continue
        name = "scan_date" if kind == "date" and scans else kind
        known, odd = measures.values[name], np.isnan(measures.values[name])
        text = cells[column].fillna("").astype(str).str.strip()
        codes, unique = pd.factorize(text)
        read = [_read(cell, kind, unit) for cell in unique]
        values = np.array([value for value, _, _ in read] or [np.nan])[codes] if len(codes) else np.empty(0)
        for row in np.flatnonzero(np.array([bool(reason) for _, _, reason in read])[codes] if len(codes) else []):
            measures.odd.append((int(row), f"{column} in {where} is {text.iat[int(row)]}: {read[codes[row]][2]}"))
        take = odd & ~np.isnan(values)
        known[take] = values[take]
        if kind == "age":
            measures.exact[take] &= np.array([exact for _, exact, _ in read], dtype=bool)[codes][take]


def _read(cell: str, kind: str, unit: float | None) -> tuple[float, bool, str]:
    """The value, whether it is exact, and a remark if it is odd."""
    if cell.lower() in MISSING:
        return np.nan, True, ""
    if kind == "date":
        date = parse_date(cell)
        return (date, True, "") if date is not None else (np.nan, True, "no date such as 2015-03-02, so unknown")
    value = parse_number(cell)
    if value is None:
        return np.nan, True, "no number, so unknown"
    default = 1.0 if "age" in kind else 1 / DAYS_PER_YEAR
    scale = next(scale for scale in (value.unit, unit, default) if scale is not None)
    years = value.number * scale
    if not 0 <= years <= OLDEST:
        return np.nan, True, f"not between 0 and {OLDEST:g} years, so unknown"
    if not value.exact:
        return years, False, f"taken as {years:g} years, and no interval rests on it"
    return years, True, ""


def add_times(table: pd.DataFrame, measures: Measures) -> tuple[pd.DataFrame, list[str]]:
    """Adds ``age``, ``time`` (years since the subject's first visit), ``visit_rank`` and ``ordered_by``.

    Unknown ages are derived from the subject's other ages, or from its age at baseline.

    Args:
        table: visits with subject and session.
        measures: the known values.

    Returns:
        The table, and phrases on odd cells and contradictions.
    """
    subject = pd.factorize(table["subject"])[0]
    labels = table["session"].tolist()
    notes = list(measures.notes)
    _drop_far_dates(measures, subject)
    if measures.odd:
        notes.append(_listed("value", "odd", [f"{visit_name(table, row)}: {text}" for row, text in measures.odd]))
    sources = _sources(measures, subject)
    written, sources["label"], refused = _label_source(sources, subject, labels)
    if refused:
        letters = ", ".join(f"{letter}1" for letter in sorted(refused))
        notes.append(f"session labels such as {letters} are numbers, not units of time: dates or ages contradict them")
    elapsed, chosen = _first_complete(np.stack([sources[name] for name in SOURCES]), subject)
    elapsed = np.where((np.bincount(subject)[subject] == 1) & np.isnan(elapsed), 0.0, elapsed)
    time = elapsed - _per_subject(elapsed, subject, "min")
    rank, known = visit_ranks(subject, labels, time, refused)
    conflicts = _conflicts(table, {**sources, "label": written}, elapsed, chosen, subject) + _against_labels(
        table, subject, time, known
    )
    if conflicts:
        notes.append(_listed("contradiction", "between sources of time", conflicts))
    age = measures.values["age"]
    offset = _per_subject(np.where(measures.exact, age - time, np.nan), subject, "mean")
    completed = np.where(np.isnan(offset), measures.values["baseline_age"] + elapsed, offset + time)
    age = np.where(np.isnan(age), completed, age)
    age[~((age >= 0) & (age <= OLDEST))] = np.nan
    return table.assign(age=age, time=time, visit_rank=rank, ordered_by=known), notes


def _listed(noun: str, rest: str, items: list[str]) -> str:
    more = f"; and {len(items) - MENTIONED} more" if len(items) > MENTIONED else ""
    return f"{count(len(items), noun)} {rest}: {'; '.join(items[:MENTIONED])}{more}"


def _drop_far_dates(measures: Measures, subject: np.ndarray) -> None:
    """If a subject's dates span more than a lifetime, dates far from their median are set to unknown (year 9999)."""
    for name in ("date", "scan_date"):
        days = measures.values[name]
        if not len(days):
            continue
        median = pd.Series(days).groupby(subject).transform("median").to_numpy()
        spread = _per_subject(days, subject, "max") - _per_subject(days, subject, "min")
        far = (spread > OLDEST * DAYS_PER_YEAR) & (np.abs(days - median) > OLDEST / 2 * DAYS_PER_YEAR)
        for row in np.flatnonzero(far):
            measures.odd.append((int(row), f"its date lies more than {OLDEST / 2:g} years from the others, so unknown"))
        days[far] = np.nan


def _sources(measures: Measures, subject: np.ndarray) -> dict[str, np.ndarray]:
    """Years of each visit since a fixed moment of its subject, by source."""
    values = measures.values
    age = np.where(measures.exact, values["age"], np.nan)
    whole = ~(_per_subject(np.where(np.isnan(age), np.nan, (age % 1 != 0).astype(float)), subject, "max") > 0)
    found = {
        "elapsed": values["elapsed"],
        "date": values["date"] / DAYS_PER_YEAR,
        "scan_date": values["scan_date"] / DAYS_PER_YEAR,
        "age": np.where(whole, np.nan, age),
        "label": np.full(len(age), np.nan),
        "whole_age": np.where(whole, age, np.nan),
    }
    return {
        name: years if name in ("elapsed", "label") else years - _per_subject(years, subject, "min")
        for name, years in found.items()
    }


def _label_source(
    sources: dict[str, np.ndarray], subject: np.ndarray, labels: list[str]
) -> tuple[np.ndarray, np.ndarray, frozenset[str]]:
    """Years by session labels as written, years as intended, and single letters that are no units.

    A letter is no unit if its labels are numbered consecutively (``w1``, ``w2``, ``w3``) and another source contradicts
    one of them.
    """
    groups = _groups(subject)
    letters = np.array([label_time(label).letter for label in labels], dtype=object)
    refused: frozenset[str] = frozenset()
    if any(letters):
        years = _by_label(groups, labels, refused)
        others = [sources[name] for name in SOURCES if name != "label"]
        better, chosen = _first_complete(np.stack(others), subject)
        whole = chosen == len(others) - 1
        wrong = np.where(
            whole, _disagree(better, years, subject, "whole_age"), _disagree(better, years, subject, "label")
        )
        for letter in sorted(set(letters) - {""}):
            numbers = {label_time(label).number for label in set(labels) if label_time(label).letter == letter}
            count_on = max(numbers) - min(numbers) == len(numbers) - 1  # 1, 2, 3 may be waves; 0, 12, 24 cannot
            if count_on and wrong[letters == letter].any():
                refused |= {str(letter)}
    return _by_label(groups, labels, frozenset()), _by_label(groups, labels, refused), refused


def _by_label(groups: list[np.ndarray], labels: list[str], refused: frozenset[str]) -> np.ndarray:
    years = np.full(len(labels), np.nan)
    known: dict[tuple[str, ...], list[float]] = {}
    for group in groups:
        names = tuple(labels[row] for row in group)
        if names not in known:
            known[names] = label_years(names, refused)
        years[group] = known[names]
    return years


def _groups(subject: np.ndarray) -> list[np.ndarray]:
    """Rows of each subject."""
    if not len(subject):
        return []
    rows = np.argsort(subject, kind="stable")
    return np.split(rows, np.flatnonzero(np.diff(subject[rows])) + 1)


def _per_subject(values: np.ndarray, subject: np.ndarray, statistic: Literal["min", "max", "mean"]) -> np.ndarray:
    """A statistic of the known values of each visit's subject; NaN if none is known."""
    if statistic == "mean":
        return pd.Series(values).groupby(subject).transform("mean").to_numpy()
    found = np.full(subject.max(initial=-1) + 1, np.nan)
    (np.fmin if statistic == "min" else np.fmax).at(found, subject, values)  # a tenth of the time of pandas
    return found[subject]


def _first_complete(sources: np.ndarray, subject: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first source that knows all visits of a subject, or else the first that knows any; and which one it is."""
    known = np.stack([np.bincount(subject, weights=~np.isnan(values)) for values in sources])
    rating = 2 * (known == np.bincount(subject)) + (known > 0)
    chosen = rating.argmax(0)[subject]
    return sources[chosen, np.arange(len(subject))], chosen


def _disagree(one: np.ndarray, two: np.ndarray, subject: np.ndarray, *names: str) -> np.ndarray:
    """Visits whose intervals differ by more than rounding and nominal visit dates can explain."""
    fixed, share = (1.25, 0.1) if "whole_age" in names else (0.1, 0.35) if "label" in names else (0.15, 0.05)
    both = ~np.isnan(one - two)
    first, second = np.where(both, one, np.nan), np.where(both, two, np.nan)

    def span(values: np.ndarray) -> np.ndarray:
        return _per_subject(values, subject, "max") - _per_subject(values, subject, "min")

    return span(first - second) > fixed + share * np.maximum(span(first), span(second))


def _conflicts(
    table: pd.DataFrame, sources: dict[str, np.ndarray], elapsed: np.ndarray, chosen: np.ndarray, subject: np.ndarray
) -> list[str]:
    """Contradictions of the chosen source by less trusted ones, with both values."""
    found = []
    names = list(SOURCES)
    for number, name in enumerate(names):
        for other in names[number + 1 :] if (chosen == number).any() else ():
            if np.isnan(sources[other]).all():
                continue
            wrong = _disagree(elapsed, sources[other], subject, name, other) & (chosen == number)
            for group in _groups(subject[wrong]):
                rows = np.flatnonzero(wrong)[group]
                rows = rows[~np.isnan(elapsed[rows] - sources[other][rows])]
                first = rows[np.argmin(elapsed[rows])]
                by_one, by_other = (values[rows] - values[first] for values in (elapsed, sources[other]))
                worst = int(np.argmax(np.abs(by_one - by_other)))
                found.append(
                    f"{visit_name(table, int(rows[worst]))} is {by_one[worst]:.2f} years after "
                    f"{table['session'].iat[first]} by {SOURCES[name]} (taken), {by_other[worst]:.2f} by "
                    f"{SOURCES[other]}"
                )
    return found


def _against_labels(table: pd.DataFrame, subject: np.ndarray, time: np.ndarray, known: np.ndarray) -> list[str]:
    """Subjects whose labels (``pre``, ``post``; ``01``, ``02``) and times disagree on the order."""
    labels = table["session"].tolist()
    rank, how = visit_ranks(subject, labels, np.full(len(time), np.nan))
    rows = np.lexsort((rank, subject))
    rows = rows[(known[rows] == "time") & (how[rows] != "") & (how[rows] != "time")]
    back = np.flatnonzero((np.diff(subject[rows]) == 0) & (np.diff(time[rows]) < 0))
    found: dict[int, str] = {}
    for place in back:
        one, two = rows[place], rows[place + 1]
        found.setdefault(
            int(subject[one]),
            f"{table['subject'].iat[one]}: {labels[two]} is {time[one] - time[two]:.2f} years before {labels[one]} by "
            f"time (taken), after it by label",
        )
    return list(found.values())
