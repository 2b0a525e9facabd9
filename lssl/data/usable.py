"""Which visits can be used: every file is read once, and the result is cached by its content.

``lssl inspect --all`` and ``lssl fit`` ask the same question and share the answers, in
``$XDG_CACHE_HOME/lssl/checked.json``: path → size, time of change, content hash and problem. A file whose time changed
but whose content did not keeps its answer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd

from lssl.data.nifti import read_image, read_label, read_mask
from lssl.data.pairs import count
from lssl.data.store import read_stored
from lssl.utils.errors import InputError, nearest
from lssl.utils.files import fingerprint, read_json, write_json

__all__ = ["check_files", "known_problems", "leave_out", "unopenable", "without_visits"]

VERSION = 1  # raised when the checks change
THREADS = min(8, os.cpu_count() or 1)
NAMED = 5  # visits that a summary names
MANY = 20  # files whose reading is announced
READERS: dict[str, Callable[[str], Any]] = {
    "image": read_image,
    "mask": read_mask,
    "label": read_label,
    "stored": lambda path: read_stored(path).verify(),
}


def check_files(paths: Iterable[str], kind: str, on_progress: Callable[[str], None] | None = None) -> dict[str, str]:
    """Checks files; those without a cached answer are read in parallel.

    Args:
        paths: files.
        kind: content of the files: ``image``, ``mask``, ``label`` or ``stored`` (a prepared visit).
        on_progress: is told before many files are read.

    Returns:
        Unusable file → the sentence that says why.
    """
    wanted = list(dict.fromkeys(paths))
    known = _read_cache()
    fresh_ones = sum(f"{kind} {_absolute(path)}" not in known for path in wanted)
    if on_progress and fresh_ones >= MANY:
        on_progress(f"{fresh_ones} {kind} files are read to check them, {THREADS} at a time; this is done once.")
    with ThreadPoolExecutor(THREADS) as pool:
        entries = list(pool.map(lambda path: _check(path, kind, known.get(f"{kind} {path}")), map(_absolute, wanted)))
    fresh = {f"{kind} {_absolute(path)}": entry for path, entry in zip(wanted, entries, strict=True) if "hash" in entry}
    if any(known.get(name) != entry for name, entry in fresh.items()):
        with contextlib.suppress(OSError):  # the cache only saves time
            write_json(_cache_file(), {**_read_cache(), **fresh})
    return {path: entry["problem"] for path, entry in zip(wanted, entries, strict=True) if entry["problem"]}


def known_problems(paths: Iterable[str], kind: str) -> dict[str, str]:
    """Problems that an earlier check found in unchanged files; nothing is read."""
    known, found = _read_cache(), {}
    for path in paths:
        entry = known.get(f"{kind} {_absolute(path)}")
        try:
            status = os.stat(path)
        except OSError:
            found[path] = f"{path} does not exist; restore it, or remove its visit."
            continue
        if entry and entry["problem"] and (entry["size"], entry["changed"]) == (status.st_size, status.st_mtime_ns):
            found[path] = entry["problem"]
    return found


def unopenable(sizes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Prepared visits whose metadata cannot be read or give another size → why. No voxel is read: each takes 0.1 ms.

    Args:
        sizes: path → voxels per axis, as the table says.
    """

    def problem(path: str) -> str:
        try:
            found = list(read_stored(path).shape)
        except InputError as error:
            return str(error)
        if found == list(sizes[path]):
            return ""
        here, there = ("×".join(map(str, size)) for size in (found, sizes[path]))
        return f"{path} has {here} voxels, but the table says {there}; run `lssl prepare` again."

    with ThreadPoolExecutor(THREADS) as pool:
        return {path: why for path, why in zip(sizes, pool.map(problem, sizes), strict=True) if why}


def _check(path: str, kind: str, known: dict[str, Any] | None) -> dict[str, Any]:
    known = known if known and known.get("version") == VERSION else None
    try:
        now = fingerprint(path, known)
    except OSError:
        now = {}
    if known and now.get("hash") == known["hash"]:
        return {**known, **now}
    try:
        READERS[kind](path)
        problem = ""
    except InputError as error:
        problem = str(error)
    return {**now, "version": VERSION, "problem": problem}


def _absolute(path: str) -> str:
    return os.path.abspath(path)


def _cache_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "lssl" / "checked.json"


def _read_cache() -> dict[str, dict[str, Any]]:
    content = read_json(_cache_file())
    return content if isinstance(content, dict) else {}


def without_visits(table: pd.DataFrame, exclude: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """A visit table without excluded visits, and a phrase with their number.

    Args:
        table: visits with subject and session.
        exclude: subjects (``sub-01``) and visits (``sub-01 ses-02`` or ``sub-01_ses-02``).

    Raises:
        InputError: for a name that is neither a subject nor a visit of the table.
    """
    if not exclude:
        return table, []
    subject, session = table["subject"].astype(str), table["session"].astype(str)
    names = pd.DataFrame({0: subject, 1: subject + " " + session, 2: subject + "_" + session})
    known = set(names.to_numpy().ravel().tolist())
    if unknown := [name for name in exclude if name not in known]:
        raise InputError(f"exclude: there is no subject or visit {unknown[0]!r}{nearest(unknown[0], known)}")
    out = names.isin(list(exclude)).any(axis=1)
    phrase = f"{count(int(out.sum()), 'visit')} as exclude asks"
    return _rest(table, out, "exclude names every visit."), [phrase]


def leave_out(
    table: pd.DataFrame, problems: Mapping[str, str], column: str = "image"
) -> tuple[pd.DataFrame, list[str]]:
    """A visit table without the visits whose file has a problem, and a phrase with their number and names.

    Args:
        table: visits with subject, session and the column.
        problems: file → why it cannot be used.
        column: ``image``, ``image_1``, … removes the visit; ``mask`` or ``label`` only empties its path.

    Raises:
        InputError: with the first problem, if no visit is left.
    """
    bad = table[column].isin(list(problems))
    if not bad.any():
        return table, []
    rows = table[bad]
    names = [f"{subject} {session}".strip() for subject, session in zip(rows["subject"], rows["session"], strict=True)]
    reasons = [f"{name}: {problems[path].rstrip('.')}" for name, path in zip(names, rows[column], strict=True)]
    some = "; ".join(reasons[:NAMED]) + (f"; and {len(reasons) - NAMED} more" if len(reasons) > NAMED else "")
    if column.startswith("image"):
        phrase = f"{count(len(rows), 'visit')} that cannot be read ({some})"
        return _rest(table, bad, next(iter(problems.values()))), [phrase]
    return table.assign(**{column: table[column].where(~bad, "")}), [f"{count(len(rows), column)} left ({some})"]


def _rest(table: pd.DataFrame, out: pd.Series, otherwise: str) -> pd.DataFrame:
    if out.all():
        raise InputError(otherwise)
    return table[~out].reset_index(drop=True)
