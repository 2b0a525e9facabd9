"""Prepares a cohort in parallel, resumable and in shards; the table at the end is complete or absent."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import lssl
from lssl.data.pairs import count
from lssl.prepare.change import change_rows, write_changes
from lssl.prepare.cohort import CohortSubject, Options, find_subjects
from lssl.prepare.overlays import overlay_lines
from lssl.prepare.quality_page import write_quality_page
from lssl.prepare.subject import current, prepare_subject, read_record, record_path, settings
from lssl.utils.errors import InputError, input_error
from lssl.utils.files import atomic_write, digest, read_json, write_json
from lssl.utils.stop import end_with_parent

__all__ = ["CHANGE", "COLUMNS", "DATASET", "QUALITY", "TABLE", "PrepareOutcome", "assemble", "prepare"]

DATASET, TABLE, QUALITY, CHANGE = "dataset.json", "visits.csv", "quality.csv", "change.tsv"
#: What training reads, in the table; all else is in the second one, as it would only slow reading down.
COLUMNS = (
    "subject",
    "session",
    "age",
    "days",
    "image",
    "site",
    "size_d",
    "size_h",
    "size_w",
    "channels",
    "aligned",
    "flags",
    "voxel_hash",
)
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class PrepareOutcome:
    """What a run did.

    Attributes:
        done: subjects that were prepared now.
        kept: subjects that had been prepared before.
        failed: subject → why nothing of it could be prepared.
        left: visit → why it was left out of its subject.
        flagged: visit → what looks wrong with it.
        overlays: sentences on masks and label maps: how many were found, taken and left, and why.
        seconds: spent.
    """

    done: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    flagged: dict[str, list[str]] = field(default_factory=dict)
    overlays: list[str] = field(default_factory=list)
    seconds: float = 0.0


def prepare(
    root: Path, out: Path, options: Options, workers: int = 1, shard: tuple[int, int] = (1, 1)
) -> PrepareOutcome:
    """Prepares the subjects of a BIDS folder that are not prepared yet.

    Args:
        root: the BIDS folder; it is only read.
        out: the folder to write to: new, empty, or holding an earlier run on the same cohort.
        options: how.
        workers: processes.
        shard: ``(i, n)`` takes every n-th subject, beginning with the i-th; shards may run at the same time.

    Returns:
        What became of every subject of the shard.
    """
    start = time.monotonic()
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    subjects, table, notes = find_subjects(root, options)
    _claim(out, root, options)
    mine = subjects[shard[0] - 1 :: shard[1]]
    outcome = PrepareOutcome(kept=[subject.name for subject in mine if current(subject, options, out)])
    kept = set(outcome.kept)
    waiting = [subject for subject in mine if subject.name not in kept]
    part = f" (shard {shard[0]} of {shard[1]})" if shard[1] > 1 else ""
    console.print(
        f"{count(len(subjects), 'subject')}, {count(len(table), 'visit')}{part}: {len(waiting)} to prepare, "
        f"{len(outcome.kept)} finished before" + "".join(f"; {remark}" for remark in notes) + "."
    )
    try:
        for subject, error in _progress(_run(waiting, options, out, workers), len(waiting), console):
            if error is None:
                outcome.done.append(subject.name)
            else:
                outcome.failed[subject.name] = error
                record_path(out, subject.name).unlink(missing_ok=True)  # what lies there is of an earlier state
    finally:
        assembled = assemble(out, table, options)
        write_quality_page(out, assembled)
    names = {subject.name for subject in mine}
    outcome.flagged = _flagged(assembled, names)
    records = [record for name in sorted(names) if (record := read_record(out, name))]
    outcome.left = {
        f"{record['subject']} {session}".strip(): reason
        for record in records
        for session, reason in record["left"].items()
    }
    outcome.overlays = overlay_lines(table, records, names)
    outcome.seconds = time.monotonic() - start
    return outcome


def _flagged(table: pd.DataFrame, subjects: set[str]) -> dict[str, list[str]]:
    """What looks wrong with the visits of these subjects."""
    return {
        f"{row['subject']} {row['session']}": row["flags"].split("; ")
        for row in table.to_dict("records")
        if row["flags"] and row["subject"] in subjects
    }


def _claim(out: Path, root: Path, options: Options) -> None:
    """Makes the folder ours, or refuses one that holds something else."""
    known = read_json(out / DATASET)
    source = os.path.realpath(root)
    if known is None and out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; name a folder to write the prepared visits to.")
    if known is None and out.is_dir() and any(entry.name[0] != "." for entry in os.scandir(out)):
        raise InputError(f"{out} is not empty and holds no prepared visits; name a new folder.")
    if known is not None and not isinstance(known, dict):
        raise InputError(f"{out / DATASET} is damaged; restore it, or name a new folder.")
    if known is not None and known.get("source") != source:
        raise InputError(
            f"{out} holds the visits of another cohort, {known.get('source')}; name a new folder, or correct 'source' "
            f"in {out / DATASET} if that cohort has moved to {source}."
        )
    content = {
        "format": 1,
        "source": source,
        "lssl": lssl.__version__,
        "versions": _versions(),
        "options": settings(options),
        "settings": digest(settings(options)),
    }
    try:
        write_json(out / DATASET, content)
    except OSError as error:
        raise InputError(f"Nothing can be written to {out} ({error.strerror}); name another folder.") from error


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("SimpleITK", "blosc2", "nibabel", "numpy", "scipy")}


def _one(subject: CohortSubject, options: Options, out: Path) -> str | None:
    """Prepares one subject; the reason if that fails. A full disk is no reason of the subject's."""
    try:
        prepare_subject(subject, options, out)
    except OSError as error:
        if error.errno in FULL:
            raise
        mistake = input_error(error)
        return str(mistake) if mistake else f"{type(error).__name__}: {error}"
    except Exception as error:
        mistake = input_error(error)
        return str(mistake) if mistake else f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _run(
    subjects: list[CohortSubject], options: Options, out: Path, workers: int
) -> Iterator[tuple[CohortSubject, str | None]]:
    """Yields each subject as it is finished, with the reason if it failed."""
    try:
        if workers <= 1:
            for subject in subjects:
                yield subject, _one(subject, options, out)
            return
        yield from _pool(subjects, options, out, workers)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise InputError(
            f"The disk of {out} is full; what is finished stays finished: free some space and run the command again."
        ) from error


def _pool(
    subjects: list[CohortSubject], options: Options, out: Path, workers: int
) -> Iterator[tuple[CohortSubject, str | None]]:
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    number = min(workers, max(1, len(subjects)))
    with ProcessPoolExecutor(number, context, _start_worker, (os.getpid(),)) as pool:
        queue = iter(subjects)
        running: dict[Future[str | None], CohortSubject] = {}
        try:
            while True:
                while len(running) < 2 * workers and (subject := next(queue, None)) is not None:
                    running[pool.submit(_one, subject, options, out)] = subject
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "A worker was killed, perhaps for want of memory; what is finished stays finished: run the same "
                "command again with fewer --workers."
            ) from error
        except BaseException:  # stopped: what is half done is done again
            for process in list((pool._processes or {}).values()):
                process.kill()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(parent: int) -> None:
    """It ends at once at a signal to all, of which its parent tells, and with its parent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    end_with_parent(parent)


def _progress(
    results: Iterator[tuple[CohortSubject, str | None]], total: int, console: Console
) -> Iterator[tuple[CohortSubject, str | None]]:
    """A bar with the time left on a terminal; elsewhere a line at every twentieth of the way."""
    bar = Progress(
        TextColumn("preparing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not sys.stderr.isatty() or not total,
    )
    start, step = time.monotonic(), max(1, -(-total // 20))
    with bar:
        task = bar.add_task("", total=total)
        for number, result in enumerate(results, 1):
            bar.advance(task)
            yield result
            if bar.disable and (number % step == 0 or number == total):
                spent = time.monotonic() - start
                left = spent / number * (total - number)
                console.print(f"{number} of {total} subjects, {spent:.0f} s, about {left:.0f} s left")


def assemble(out: Path, table: pd.DataFrame, options: Options) -> pd.DataFrame:
    """Writes the visit table from the records of all finished subjects of this cohort, whoever made them.

    Matrices, quality figures and hashes go to a second table of the same rows. Shards may finish at the same time:
    whoever writes looks once more whether records have come in the meantime.
    """
    times = {(row["subject"], row["session"]): row for row in table.to_dict("records")}
    wanted = digest(settings(options))
    while True:
        seen = _records(out)
        rows: list[dict[str, Any]] = []
        changes: list[dict[str, Any]] = []
        for name in dict.fromkeys(table["subject"]):
            record = read_record(out, name) if f"{name}.json" in seen else None
            if record and record["settings"] == wanted:
                rows += _table_rows(name, record, times)
                changes += change_rows(name, record, times)
        kept = [*COLUMNS, *(["field"] if options.nonrigid else [])]
        frame = pd.DataFrame(rows, columns=None if rows else kept)
        rest = ["subject", "session", *(name for name in frame if name not in kept)]
        for name, columns in ((QUALITY, rest), (TABLE, kept)):
            with atomic_write(out / name) as part:
                frame.reindex(columns=columns).to_csv(part, index=False)
        if options.nonrigid:
            write_changes(out / CHANGE, changes)
        if _records(out) == seen:
            return frame


def _records(out: Path) -> dict[str, int]:
    folder = out / "records"
    if not folder.is_dir():
        return {}
    found = {}
    for entry in os.scandir(folder):
        if entry.name.endswith(".json"):
            try:
                found[entry.name] = entry.stat().st_mtime_ns
            except FileNotFoundError:
                continue
    return found


def _table_rows(
    name: str, record: dict[str, Any], times: dict[tuple[str, str], dict[Any, Any]]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    before = float("nan")
    for visit in record["visits"]:
        known = times.get((name, visit["session"]))
        if known is None:  # no longer in the cohort
            continue
        interval, before = known["time"] - before, known["time"]
        rest = {key: value for key, value in visit.items() if key not in ("session", "image", "flags")}
        rows.append(
            {
                "subject": name,
                "session": visit["session"] or name,
                "age": _round(known["age"], 4),
                "days": _round(known["time"] * 365.25, 2),
                "image": visit["image"],
                "site": known.get("site") or "",
                "years_since_last": _round(interval, 4),
                **{key: _round(value, 6) if isinstance(value, float) else value for key, value in rest.items()},
                "flags": "; ".join(visit["flags"]),
                "settings": record["settings"],
            }
        )
    return rows


def _round(value: float, digits: int) -> float:
    return value if np.isnan(value) else round(float(value), digits)
