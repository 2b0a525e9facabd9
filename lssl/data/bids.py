"""The visits of a BIDS folder: their images, and their times from its tables.

``docs/times.md`` lists what is read, and in which order it is trusted.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lssl.data.pairs import count
from lssl.data.selection import choose
from lssl.data.sidecars import SESSION, SUBJECT, SidecarTable, normal_id, read_table, rows_by_id
from lssl.data.times import Measures, add_times, family, read_measures
from lssl.utils.errors import InputError

__all__ = ["bids_files", "bids_table", "match_files", "session_tables", "with_sidecars"]


def bids_table(
    root: str | Path,
    suffix: str,
    masks: str | None = None,
    labels: str | None = None,
    select: str | Sequence[str] = "",
) -> tuple[pd.DataFrame, list[str]]:
    """The visits of a BIDS folder, ``sub-*/[ses-*]/anat/*_<suffix>.nii[.gz]``.

    Args:
        root: the folder.
        suffix: how the file name ends; it may carry entities (``run-1_T1w``, ``ce-gad_T1w``).
        masks: pattern of masks, see :func:`match_files`.
        labels: pattern of label maps.
        select: which image of a visit is taken, see :func:`lssl.data.selection.choose`.

    Returns:
        The table, and phrases that count what was left out, decided by default or odd.
    """
    files, notes = bids_files(Path(root), suffix, select)
    table = files[files["taken"]].drop(columns=["taken", "why"]).rename(columns={"file": "image"})
    table, odd = with_sidecars(Path(root), table.reset_index(drop=True), masks, labels)
    return table, notes + odd


def with_sidecars(
    root: Path, table: pd.DataFrame, masks: str | None = None, labels: str | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """Visits with their times and sites from the tables of a BIDS folder, and with their masks and label maps.

    Args:
        root: the folder.
        table: ``subject``, ``session`` and ``image``.
        masks: pattern of masks, see :func:`match_files`.
        labels: pattern of label maps.

    Returns:
        The table, and phrases on what was odd.
    """
    measures = Measures.empty(len(table))
    participants = read_table(root / "participants.tsv")
    _participants(measures, table, participants)
    for path in session_tables(root, table):
        _sessions(measures, table, path, root)
    _scans(measures, table, root)
    table, odd = add_times(table, measures)
    sites = rows_by_id(participants, SUBJECT, "sub-", set(table["subject"]))
    names = [next((row["site"] for row in sites.get(subject, []) if "site" in row), "") for subject in table["subject"]]
    if any(names):
        table["site"] = names
    for column, pattern in (("mask", masks), ("label", labels)):
        table[column] = match_files(root, pattern, table, f"{column}s") if pattern else ""
    return table, odd


def bids_files(root: Path, suffix: str, select: str | Sequence[str] = "") -> tuple[pd.DataFrame, list[str]]:
    """Every image with the suffix, and whether it is taken.

    Returns:
        Columns ``subject``, ``session``, ``file``, ``taken`` (bool; one per visit) and ``why`` it is left out; and
        phrases.
    """
    if not root.is_dir():
        raise InputError(f"The folder {root} does not exist; give the BIDS folder that holds the sub-* folders.")
    sessions = _scan(root)
    if not sessions:
        raise InputError(f"{root} holds no sub-* folders; give the BIDS folder that holds them, or a table.")
    endings = (f"_{suffix}.nii", f"_{suffix}.nii.gz")
    matches = [[name for name in names if name.endswith(endings)] for _, _, names in sessions]
    if not any(matches):
        raise InputError(_no_match(root, suffix, [name for _, _, names in sessions for name in names]))
    choice = choose(matches, suffix, select)
    if not any(choice.taken):
        reasons = ", ".join(sorted({why for _, _, why in choice.left}))
        raise InputError(f"All {suffix} images of {root} are left out ({reasons}); choose others with select.")
    rows = [(visit, name, True, "") for visit, name in enumerate(choice.taken) if name]
    rows += [(visit, name, False, why) for visit, name, why in choice.left]
    listed = [
        (*sessions[visit][:2], os.path.join(root, *sessions[visit][:2], "anat", name), taken, why)
        for visit, name, taken, why in sorted(rows)
    ]
    notes = []
    if without := sum(not names for names in matches):
        notes.append(f"{count(without, 'visit')} without a {suffix} image")
    if lost := sum(bool(names) and not taken for names, taken in zip(matches, choice.taken, strict=True)):
        notes.append(f"{count(lost, 'visit')} whose {suffix} images are all left out")
    why_left = [why for _, _, why in choice.left if "is taken" not in why]
    for why in sorted(set(why_left)):
        what = "with contrast agent (ce-)" if why.startswith("ce=none") else f"left out ({why})"
        notes.append(f"{count(why_left.count(why), 'image')} {what}")
    return pd.DataFrame(listed, columns=["subject", "session", "file", "taken", "why"]), notes + choice.notes


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
            ``**``. Without ``{session}``, one file of a subject is used for all its visits.
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


# --- tables beside the images -----------------------------------------------------------------------------------------


def _frame(rows: Sequence[dict[str, str]]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), dtype=object)


def _participants(measures: Measures, table: pd.DataFrame, participants: SidecarTable) -> None:
    """One row per subject (its age is the one at baseline), one per visit, or columns such as ``age_M12``."""
    measures.notes += participants.notes
    where = participants.path.name
    rows = rows_by_id(participants, SUBJECT, "sub-", set(table["subject"]))
    if participants.rows and not rows:
        measures.notes.append(f"{where} has no column participant_id and is not read")
    visits, once, confused = [], [], []
    for subject, group in table.groupby("subject", sort=False):
        mine = rows.get(str(subject), [])
        sessions = rows_by_id(SidecarTable(participants.path, mine), SESSION, "ses-", set(group["session"]))
        per_visit = not sessions.keys().isdisjoint(group["session"])
        only = len(group) == 1 and len(mine) == 1 and not per_visit  # a subject's value holds for its visit
        if not per_visit and len(mine) > 1 and any(row != mine[0] for row in mine):
            confused.append(str(subject))
            mine = []
        for row, session in zip(group.index, group["session"], strict=True):
            visits.append((row, sessions.get(session, [{}])[0] if per_visit else _wide(mine, session)))
            visits[-1] = (row, {**mine[0], **visits[-1][1]}) if only else visits[-1]
        once += [(int(group.index[0]), {} if per_visit or not mine else mine[0])]
    units = dict(participants.units)
    for column, unit in participants.units.items():  # of "age_M12" under the name that _wide gives its cells
        for label in set(table["session"]):
            units |= dict.fromkeys(_wide([{column: "0"}], label), unit)
    if confused:
        measures.notes.append(
            f"{count(len(confused), 'subject')} with several rows but no session in {where}, which are not read "
            f"({', '.join(confused[:3])})"
        )
    read_measures(measures, _aligned(visits, len(table)), where, units)
    baseline = _aligned(once, len(table)).rename(columns=_as_baseline)
    units = {_as_baseline(name): unit for name, unit in participants.units.items()}
    baseline = baseline.loc[:, ~baseline.columns.duplicated()]
    kinds = [name for name in baseline if family(str(name))[0] == "baseline_age"]
    read_measures(measures, baseline[kinds], where, units)
    known = pd.Series(measures.values["baseline_age"])
    measures.values["baseline_age"] = known.groupby(table["subject"]).transform("max").to_numpy(copy=True)


def _as_baseline(column: str) -> str:
    """A subject's one age is its age at baseline."""
    kind, unit = family(column)
    if kind != "age":
        return column
    names = {1 / 12: "_months", 7 / 365.25: "_weeks", 1 / 365.25: "_days"}
    return "age_at_baseline" + ("" if unit is None else names.get(unit, "_years"))


def _wide(rows: list[dict[str, str]], session: str) -> dict[str, str]:
    """Cells of columns that name the session, ``age_M12`` or ``ses-M12_acq_time``, under the rest of their name."""
    label = normal_id(session, "ses-")
    found: dict[str, str] = {}
    for column, text in (rows[0] if rows and label else {}).items():
        parts = re.split(r"[_\s.]+", column)
        for rest, name in (("_".join(parts[:-1]), parts[-1]), ("_".join(parts[1:]), parts[0])):
            if normal_id(name, "ses-") == label and family(rest)[0] in ("age", "elapsed", "date"):
                found.setdefault(rest, text)
    return found


def _aligned(rows: list[tuple[int, dict[str, str]]], visits: int) -> pd.DataFrame:
    """Cells by row of the visit table."""
    frame = _frame([row for _, row in rows])
    frame.index = pd.Index([place for place, _ in rows])
    return frame.reindex(range(visits))


def session_tables(root: Path, table: pd.DataFrame) -> list[tuple[str, SidecarTable]]:
    """``sub-*_sessions.tsv`` of every subject, then a ``sessions.tsv`` for all of them."""
    found = [
        (subject, read_table(root / subject / f"{subject}_sessions.tsv", root / "sessions.json"))
        for subject in dict.fromkeys(table["subject"])
    ]
    return [*found, ("", read_table(root / "sessions.tsv"))]


def _sessions(measures: Measures, table: pd.DataFrame, found: tuple[str, SidecarTable], root: Path) -> None:
    subject, sessions = found
    measures.notes += sessions.notes
    if not sessions.rows:
        return
    subjects = {subject: sessions.rows} if subject else rows_by_id(sessions, SUBJECT, "sub-", set(table["subject"]))
    where = os.path.relpath(sessions.path, root)
    if not any(name in row for row in sessions.rows for name in SESSION):
        measures.notes.append(f"{where} has no column session_id and is not read")
        return
    groups = table.groupby("subject").indices
    cells: list[tuple[int, dict[str, str]]] = []
    for name, rows in subjects.items():
        places = groups.get(name, [])
        labels = [str(table["session"].iat[int(place)]) for place in places]
        by_session = rows_by_id(SidecarTable(sessions.path, rows), SESSION, "ses-", set(labels))
        cells += [(int(place), by_session.get(label, [{}])[0]) for place, label in zip(places, labels, strict=True)]
    if cells:
        frame = _frame([row for _, row in cells])
        frame.index = pd.Index([place for place, _ in cells])
        _read_rows(measures, frame, where, sessions.units)


def _read_rows(
    measures: Measures, cells: pd.DataFrame, where: str, units: dict[str, float], scans: bool = False
) -> None:
    """:func:`read_measures` of the rows that ``cells`` has, by its index."""
    rows = cells.index.to_numpy()
    part = Measures({name: values[rows] for name, values in measures.values.items()}, measures.exact[rows])
    read_measures(part, cells.reset_index(drop=True), where, units, scans)
    for name, values in part.values.items():
        measures.values[name][rows] = values
    measures.exact[rows] = part.exact
    measures.odd += [(int(rows[row]), text) for row, text in part.odd]


def _scans(measures: Measures, table: pd.DataFrame, root: Path) -> None:
    """``*_scans.tsv`` of each visit: the row of its image, or else the first row with a date."""
    cells: list[dict[str, str]] = []
    places: list[int] = []
    units: dict[str, float] = {}
    for place, (subject, session, image) in enumerate(
        zip(table["subject"], table["session"], table["image"], strict=True)
    ):
        stem = "_".join(name for name in (subject, session) if name)
        scans = read_table(root / subject / session / f"{stem}_scans.tsv", root / "scans.json")
        if session and not scans.rows:  # one table for all sessions of a subject names files below ses-*/
            scans = read_table(root / subject / f"{subject}_scans.tsv", root / "scans.json")
            scans.rows = [row for row in scans.rows if f"{session}/" in row.get("filename", "").replace("\\", "/")]
        measures.notes += scans.notes
        units |= scans.units
        name = os.path.basename(str(image))
        mine = [row for row in scans.rows if os.path.basename(row.get("filename", "").replace("\\", "/")) == name]
        dated = [row for row in scans.rows if any(family(column)[0] == "date" for column in row)]
        row = next((row for row in mine if row in dated), next(iter(dated), next(iter(mine), {})))
        if row:
            cells.append(row)
            places.append(place)
    if cells:
        frame = _frame(cells)
        frame.index = pd.Index(places)
        _read_rows(measures, frame, "scans.tsv", units, scans=True)
