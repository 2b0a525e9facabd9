"""The output folder: of one plan, used by one process at a time, each cell there whole or not at all; without torch."""

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
    """Turns what the system says of a full disk or a folder that may not be written into a sentence."""
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
    """The folder, for this process alone; refused if it is another plan's or in use.

    The lock is the kernel's, so it is gone with the process, and with the cells that inherit it: none of a killed
    benchmark can still be writing when the next one begins.

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
    """What is noted of a cell that was finished with this key, else ``None``."""
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
    """Notes that a cell is finished, and its commands' seconds."""
    write_json(cell.folder / DONE, {"key": key, "seconds": seconds})


def _identity(plan: Plan) -> dict[str, Any]:
    """What may not change between runs into one folder: rows of other data or networks are not comparable."""
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
