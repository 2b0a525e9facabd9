"""Visit tables from a BIDS folder or a CSV.

Both give one row per visit with the columns ``subject``, ``session``, ``age`` (years), ``time`` (years since the
subject's first visit), ``image``, ``mask`` and ``label`` (paths, or empty).
"""

from __future__ import annotations

import csv
import glob
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from lssl.data.pairs import count, visit_name
from lssl.utils.errors import InputError

__all__ = ["add_times", "bids_table", "csv_table", "file_table", "label_days", "match_files"]

DAYS_PER_YEAR = 365.25
UNITS = {"d": 1.0, "w": 7.0, "m": DAYS_PER_YEAR / 12, "y": DAYS_PER_YEAR}
ALIASES = {
    "age": ("age",),
    "days": ("days_since_baseline", "days"),
    "date": ("acq_time", "date"),
}


def bids_table(
    root: str | Path, suffix: str, masks: str | None = None, labels: str | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """The visits of a BIDS folder, ``sub-*/[ses-*]/anat/*_<suffix>.nii[.gz]``.

    Args:
        root: the folder.
        suffix: how the file name ends; it may carry entities (``run-1_T1w``, ``ce-gad_T1w``). Images with contrast
            agent (``ce-``) are left out unless the suffix names it.
        masks: pattern of masks, see :func:`match_files`.
        labels: pattern of label maps.

    Returns:
        The table, and phrases that count what was left out.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"The folder {root} does not exist; give the BIDS folder that holds the sub-* folders.")
    sessions = _scan(root)
    if not sessions:
        raise InputError(f"{root} holds no sub-* folders; give the BIDS folder that holds them, or a table.")
    endings = (f"_{suffix}.nii", f"_{suffix}.nii.gz")
    matches = [[name for name in names if name.endswith(endings)] for _, _, names in sessions]
    contrast = 0
    if "ce-" not in suffix:
        contrast = sum("_ce-" in name for names in matches for name in names)
        matches = [[name for name in names if "_ce-" not in name] for names in matches]
    if not any(matches):
        raise InputError(_no_match(root, suffix, [name for _, _, names in sessions for name in names]))
    rows = [
        (subject, session, os.path.join(root, subject, session, "anat", _only(names, suffix, f"{subject} {session}")))
        for (subject, session, _), names in zip(sessions, matches, strict=True)
        if names
    ]
    table = pd.DataFrame(rows, columns=["subject", "session", "image"])
    table = add_times(table.join(_bids_times(root, table)), str(root))
    sites = {name: row.get("site") for name, row in _read_tsv(root / "participants.tsv", "sub-").items()}
    if any(sites.values()):
        table["site"] = [sites.get(subject) or "" for subject in table["subject"]]
    for column, pattern in (("mask", masks), ("label", labels)):
        table[column] = match_files(root, pattern, table, f"{column}s") if pattern else ""
    left_out = [f"{count(len(sessions) - len(rows), 'visit')} without a {suffix} image"] * (len(rows) < len(sessions))
    if contrast:
        left_out.append(f"{count(contrast, 'image')} with contrast agent (ce-)")
    return table, left_out


def file_table(path: str | Path) -> pd.DataFrame:
    """The one visit of a single NIfTI file; its subject and session are those that a BIDS name carries."""
    name = Path(path).name
    if not name.endswith((".nii", ".nii.gz")):
        raise InputError(f"{path} is no NIfTI file; give one that ends in .nii or .nii.gz, or a folder.")
    entities = {key: re.search(rf"(?:^|_)({key}-[A-Za-z0-9]+)", name) for key in ("sub", "ses")}
    subject, session = (found[1] if found else "" for found in entities.values())
    row = {"subject": subject or name.split(".nii")[0], "session": session, "image": str(path), "mask": "", "label": ""}
    return pd.DataFrame([{**row, "age": np.nan, "time": 0.0}])


def _scan(root: Path) -> list[tuple[str, str, list[str]]]:
    """Subject, session (empty without session folders) and names in ``anat`` of every visit."""
    found = []
    for subject in sorted(entry.name for entry in os.scandir(root) if entry.name.startswith("sub-") and entry.is_dir()):
        folders = sorted(entry.name for entry in os.scandir(root / subject) if entry.is_dir())
        sessions = [name for name in folders if name.startswith("ses-")]
        for session in sessions + [""] * ("anat" in folders or not sessions):
            anat = root / subject / session / "anat"
            names = sorted(os.listdir(anat)) if anat.is_dir() else []
            # Names that begin otherwise are not BIDS: resource forks ("._sub-01…"), half-finished copies.
            found.append((subject, session, [name for name in names if name.startswith(subject)]))
    return found


def _only(names: list[str], suffix: str, visit: str) -> str:
    """The image of a visit, if there is no other."""
    if len(names) > 1:
        raise InputError(
            f"Duplicate visit: {visit.strip()} has {len(names)} images that end in {suffix} ({', '.join(names)}); "
            f"say which by a longer suffix such as run-1_{suffix}, or remove the others."
        )
    return names[0]


def _no_match(root: Path, suffix: str, names: list[str]) -> str:
    known = [re.sub(r"\.nii(\.gz)?$", "", name).rsplit("_", 1)[-1] for name in names if ".nii" in name]
    suffixes = ", ".join(f"{value} ({known.count(value)})" for value in sorted(set(known)))
    hint = f"the suffixes there are: {suffixes}" if suffixes else "there is no image in any anat folder"
    return f"No visit of {root} matches sub-*/[ses-*]/anat/*_{suffix}.nii[.gz]; {hint}."


def match_files(root: str | Path, pattern: str, table: pd.DataFrame, option: str) -> list[str]:
    """One file per visit by a pattern; empty where there is none.

    Args:
        root: folder the pattern starts from.
        pattern: path with ``{subject}`` and ``{session}``, as in ``sub-01`` and ``ses-01``, and the wildcards ``*`` and
            ``**``. Without ``{session}``, a subject's file serves all its visits.
        table: the visits.
        option: what to call the pattern in messages.
    """
    found: dict[str, str] = {}
    names = []
    for subject, session in zip(table["subject"], table["session"], strict=True):
        try:
            name = pattern.format(subject=subject, session=session)
        except (KeyError, IndexError, ValueError) as error:
            raise InputError(
                f"The pattern {option}={pattern!r} has other placeholders than {{subject}} and {{session}}."
            ) from error
        names.append(name)
        if name not in found:
            hits = sorted(glob.glob(name, root_dir=root, recursive=True))
            if len(hits) > 1:
                raise InputError(
                    f"The pattern {option}={pattern!r} matches {len(hits)} files for {subject} {session} "
                    f"({', '.join(hits[:3])}{', …' if len(hits) > 3 else ''}); make it match one."
                )
            found[name] = os.path.join(root, hits[0]) if hits else ""
    if not any(found.values()):
        raise InputError(f"No file of {root} matches {option}={pattern!r} (looked for {names[0]}, for example).")
    return [found[name] for name in names]


def _bids_times(root: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Age, days and date of each visit from ``sessions.tsv``, and the subject's age from ``participants.tsv``."""
    sessions = {
        subject: _read_tsv(root / subject / f"{subject}_sessions.tsv", "ses-") for subject in set(table["subject"])
    }
    participants = _read_tsv(root / "participants.tsv", "sub-")
    columns: dict[str, list[str | None]] = {name: [] for name in (*ALIASES, "baseline_age")}
    for subject, session in zip(table["subject"], table["session"], strict=True):
        values = sessions[subject].get(session, {})
        for name, aliases in ALIASES.items():
            columns[name].append(next((values[alias] for alias in aliases if values.get(alias)), None))
        columns["baseline_age"].append(participants.get(subject, {}).get("age"))
    return pd.DataFrame(columns, index=table.index)


def _read_tsv(path: Path, prefix: str) -> dict[str, dict[str, str | None]]:
    """Rows of a BIDS table by their first column, whose values get the prefix if they lack it."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    key = {"ses-": "session_id", "sub-": "participant_id"}[prefix]
    if rows and key not in rows[0]:
        raise InputError(f"{path} has no column {key}; its columns are {', '.join(map(str, rows[0]))}.")
    table = {}
    for row in rows:
        if not row[key]:
            continue
        name = row[key] if row[key].startswith(prefix) else prefix + row[key]
        table[name] = {column: None if value in ("n/a", "", None) else value for column, value in row.items()}
    return table


def csv_table(path: str | Path, root: str | Path | None = None, columns: Collection[str] | None = None) -> pd.DataFrame:
    """The visits of a CSV (or TSV, by its ending).

    Columns: ``subject``, ``session``, ``image``; one or more of ``age`` (years), ``days`` (since any fixed day of the
    subject) and ``date`` (YYYY-MM-DD), which may be empty; optionally ``mask``, ``label``, ``site``, ``split``.

    Args:
        path: the table.
        root: folder that relative paths start from; the table's own by default.
        columns: reads these only; ``None`` reads all.
    """
    path = Path(path)
    table = _read_csv(path, columns)
    if "split" in table:
        table["split"] = table["split"].str.strip().str.lower()
    folder = os.fspath(path.parent if root is None else root)
    for column in ("image", "mask", "label"):
        paths = table[column].fillna("").tolist() if column in table else []
        table[column] = [name and os.path.join(folder, name) for name in paths] or ""
    repeated = np.flatnonzero(table["image"].duplicated())
    if len(repeated):
        second = int(repeated[0])
        first = int((table["image"] == table["image"].iat[second]).to_numpy().argmax())
        raise InputError(
            f"Duplicate visit: lines {first + 2} and {second + 2} of {path} name the same image, "
            f"{table['image'].iat[second]}; keep one line per visit."
        )
    return add_times(table, str(path))


def _read_csv(path: Path, columns: Collection[str] | None) -> pd.DataFrame:
    """A table as text with lower-case column names, in which every line says what visit it is."""
    if not path.exists():
        raise InputError(f"The table {path} does not exist; correct its path.")
    try:
        table = pd.read_csv(
            path,
            sep="\t" if path.suffix == ".tsv" else ",",
            dtype=str,
            encoding="utf-8-sig",
            usecols=None if columns is None else lambda name: str(name).strip().lower() in columns,
        )
    except ValueError as error:  # what pandas raises for empty, ragged and wrongly encoded files
        reason = " ".join(str(error).split())
        raise InputError(
            f"The table {path} cannot be read ({reason}); write it as a CSV with a header line."
        ) from error
    table.columns = pd.Index([str(column).strip().lower() for column in table.columns])
    missing = [column for column in ("subject", "session", "image") if column not in table]
    if missing:
        raise InputError(
            f"The table {path} lacks the {'column' if len(missing) == 1 else 'columns'} {', '.join(missing)}; "
            f"it has {', '.join(table.columns)}."
        )
    for column in ("subject", "session", "image"):
        empty = np.flatnonzero(table[column].isna())
        if len(empty):
            raise InputError(f"Line {empty[0] + 2} of {path} has no {column}; fill it in or remove the line.")
    return table


def label_days(session: str) -> float:
    """Days that a session label carries: ``ses-d0129`` (OASIS-3) 129, ``ses-M024`` (ADNI) 730.5; NaN if it does not."""
    match = re.fullmatch(r"(?:ses-)?([dwmy])(\d+)", session.lower())
    return float(match[2]) * UNITS[match[1]] if match else np.nan


def add_times(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """Adds ``time`` and completes ``age`` from age, days, date and session labels.

    Time comes from the first of these that all visits of a subject have: days, date, age, label; whole-numbered ages
    come last. Unknown ages follow from the subject's other ages, or from its age at baseline.

    Args:
        table: visits with subject and session, and any of age, days, date, baseline_age as text.
        source: what to call the table in messages.
    """
    age, days, baseline = (_numbers(table, name, source) for name in ("age", "days", "baseline_age"))
    _refuse(table, age, (age < 0) | (age > 130), "age", "ages are years", source)
    _refuse(table, days, days < 0, "days", "days count from the subject's first visit", source)
    subject = pd.factorize(table["subject"])[0]
    session, labels = pd.factorize(table["session"])
    label = np.array([label_days(name) for name in labels])[session] / DAYS_PER_YEAR
    relative_age = age - _per_subject(age, subject, "min")
    sources = [days / DAYS_PER_YEAR, _years(table, subject, source), relative_age, label]
    if (age[~np.isnan(age)] % 1 == 0).all():
        sources[2:] = [label, relative_age]
    elapsed = _first_complete(np.stack(sources), subject)
    elapsed = np.where((np.bincount(subject)[subject] == 1) & np.isnan(elapsed), 0.0, elapsed)
    time = elapsed - _per_subject(elapsed, subject, "min")
    offset = age - time
    spread = _per_subject(offset, subject, "max") - _per_subject(offset, subject, "min")
    if (spread > 1.5).any():  # ages in whole years may be off by one
        row = int(np.nanargmax(spread))
        raise InputError(
            f"The times of {table['subject'].iat[row]} in {source} contradict each other: its ages disagree with its "
            f"days, dates or session labels by {spread[row]:.1f} years; correct one of them."
        )
    known = _per_subject(offset, subject, "mean") + time
    age = np.where(np.isnan(age), np.where(np.isnan(known), baseline + elapsed, known), age)
    rest = table.drop(columns=["age", "days", "date", "baseline_age"], errors="ignore")
    return rest.assign(age=age, time=time)


def _per_subject(values: np.ndarray, subject: np.ndarray, statistic: Literal["min", "max", "mean"]) -> np.ndarray:
    """A statistic of the known values of each visit's subject; NaN if none is known."""
    return pd.Series(values).groupby(subject).transform(statistic).to_numpy()


def _first_complete(sources: np.ndarray, subject: np.ndarray) -> np.ndarray:
    """Of ``(sources, visits)`` the first source that a subject has for all visits, else the first it has for any."""
    known = np.stack([np.bincount(subject, weights=~np.isnan(values)) for values in sources])
    rating = 2 * (known == np.bincount(subject)) + (known > 0)
    return sources[rating.argmax(0)[subject], np.arange(len(subject))]


def _numbers(table: pd.DataFrame, column: str, source: str) -> np.ndarray:
    if column not in table:
        return np.full(len(table), np.nan)
    numbers = pd.to_numeric(table[column], errors="coerce").to_numpy(float)
    wrong = np.isnan(numbers) & table[column].notna().to_numpy()
    _refuse(table, table[column].to_numpy(), wrong, column, "write a number, or n/a where it is unknown", source)
    return numbers


def _years(table: pd.DataFrame, subject: np.ndarray, source: str) -> np.ndarray:
    """Years since the subject's first date."""
    if "date" not in table:
        return np.full(len(table), np.nan)
    dates = pd.to_datetime(table["date"], errors="coerce", format="ISO8601", utc=True)
    wrong = (dates.isna() & table["date"].notna()).to_numpy()
    _refuse(table, table["date"].to_numpy(), wrong, "date", "write YYYY-MM-DD, or n/a where it is unknown", source)
    seconds = (dates - pd.Timestamp(0, tz="utc")).dt.total_seconds().to_numpy(float)
    return (seconds - _per_subject(seconds, subject, "min")) / (86400 * DAYS_PER_YEAR)


def _refuse(table: pd.DataFrame, values: np.ndarray, wrong: np.ndarray, column: str, why: str, source: str) -> None:
    """Stops at the first visit whose value is wrong."""
    if wrong.any():
        row = int(wrong.argmax())
        column = column.replace("baseline_age", "age in participants.tsv")
        raise InputError(f"The {column} of {visit_name(table, row)} in {source} is {values[row]}; {why}.")
