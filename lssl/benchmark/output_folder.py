"""The output folder: for one plan and one process at a time, with cells written atomically; without torch."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lssl.benchmark.plan import Cell, Plan
from lssl.utils.errors import InputError
from lssl.utils.files import digest, read_json, write_json

__all__ = ["claimed", "mark_done", "read_done", "reset", "writing"]

PLAN, LOCK, DONE = "plan.json", ".lock", "done.json"
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns the system's error on a full or read-only disk into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise InputError(
            f"{error.filename or out} cannot be written ({error.strerror or error}); what is finished stays, and the "
            f"same command goes on."
        ) from None


@contextmanager
def claimed(plan: Plan) -> Iterator[int]:
    """Locks the folder for this process; refuses a folder in use or of another plan.

    The kernel holds the lock until this process and all cells that inherit it have ended. So no cell of a killed
    benchmark can still write when the next benchmark begins.

    Yields:
        The lock's file descriptor, for cells to inherit.
    """
    with writing(plan.out):
        _refuse_foreign(plan)
        plan.out.mkdir(parents=True, exist_ok=True)
        lock = os.open(plan.out / LOCK, os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(lock, 40, 0).decode() or "another process"
            raise InputError(f"{plan.out} is in use by process {who}; wait for it, or give another --out.") from None
        with writing(plan.out):
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
            write_json(plan.out / PLAN, _identity(plan))
        yield lock
    finally:
        os.close(lock)


def read_done(cell: Cell, key: str) -> dict[str, Any] | None:
    """The notes of a cell that finished with this fingerprint, else ``None``."""
    note = read_json(cell.folder / DONE)
    return note if isinstance(note, dict) and note.get("key") == key else None


def reset(cell: Cell) -> None:
    """An empty folder that holds the cell's config."""
    import yaml

    if cell.folder.exists():
        shutil.rmtree(cell.folder)
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.yaml").write_text(yaml.safe_dump(cell.config, sort_keys=False, allow_unicode=True))


def mark_done(cell: Cell, key: str, seconds: list[float]) -> None:
    """Marks a cell as finished, with its commands' seconds."""
    write_json(cell.folder / DONE, {"key": key, "seconds": seconds})


def _identity(plan: Plan) -> dict[str, Any]:
    """Settings that must not change in one folder: rows of other data or networks are not comparable."""
    return {name: digest(value) for name, value in plan.shared.items()}


def _refuse_foreign(plan: Plan) -> None:
    if not plan.out.exists() or not any(path.name != LOCK for path in plan.out.iterdir()):
        return
    earlier = read_json(plan.out / PLAN)
    if not isinstance(earlier, dict):
        raise InputError(f"{plan.out} holds something else than a benchmark; give another out.")
    other = [name for name, value in _identity(plan).items() if earlier.get(name) != value]
    if other:
        raise InputError(
            f"{plan.out} holds a benchmark with other settings of {' and '.join(other)}, whose rows are not "
            f"comparable; give another out."
        )
