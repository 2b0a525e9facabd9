"""RunLock: one run at a time writes into a run folder."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

from lssl.utils.errors import InputError
from lssl.utils.files import process_runs

__all__ = ["FolderInUse", "RunLock", "slurm_job"]

BEAT, STALE = 30.0, 300.0  # seconds between signs of life, and without one until a run counts as dead
NAME = re.compile(r"\.run-(\d+)\.lock")


class FolderInUse(InputError):
    """Another run is writing into the folder."""


class RunLock:
    """The sole right to write into a run folder, until :meth:`release` or the end of the process.

    The right belongs to the highest number n of the files ``.run-n.lock``, each created exclusively, which also NFS
    does atomically. A file names host, process and SLURM job, and its time of change is renewed every 30 s. If the
    highest one is of a dead run, the next number can be created, by one process alone. A run is dead if its process is
    not there (same machine), if it was the same SLURM job before a requeue, or without a sign of life for 5 minutes.

    Args:
        folder: is made if it does not exist.

    Raises:
        FolderInUse: a living run has the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._pid, self._end, self._id = folder, os.getpid(), threading.Event(), uuid.uuid4().hex
        self._made = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self.path = self._create()
        threading.Thread(target=self._beat, daemon=True).start()

    def _create(self) -> Path:
        while True:
            before = _numbers(self.folder)
            if before and _alive(path := _file(self.folder, before[-1])):
                raise FolderInUse(_in_use(self.folder, path))
            number = before[-1] + 1 if before else 1
            path = _file(self.folder, number)
            try:
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:  # another run was quicker
                continue
            with os.fdopen(handle, "w") as file:
                json.dump({**_me(), "id": self._id}, file)
            if _numbers(self.folder)[-1] != number:  # the lower numbers were removed while we looked
                path.unlink()
                continue
            for old in before:
                _file(self.folder, old).unlink(missing_ok=True)
            return path

    @property
    def lost(self) -> bool:
        """Whether the lock is gone: somebody deleted or moved the folder while the run was writing."""
        return not self.path.exists()

    @property
    def made_folder(self) -> bool:
        """Whether the folder was not there before."""
        return self.folder in self._made

    def check(self) -> None:
        """Refuses to go on if another run has taken the folder: this one was taken for dead, or the folder was new."""
        numbers = _numbers(self.folder)
        if numbers and (_file(self.folder, numbers[-1]) != self.path or _read(self.path).get("id") != self._id):
            raise InputError(
                f"{self.folder} now belongs to another run: this one's folder was deleted or moved, or it had given no "
                f"sign of life for {STALE / 60:.0f} minutes."
            )

    def release(self) -> None:
        """Gives the folder back; if nothing was written into it, it goes, too."""
        if os.getpid() != self._pid:  # a forked worker
            return
        self._end.set()
        with suppress(OSError):
            if _read(self.path).get("id") == self._id:  # a later run may have made the folder anew
                self.path.unlink()
            for place in self._made:
                place.rmdir()

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            with suppress(OSError):
                os.utime(self.path)


def slurm_job() -> str:
    """The SLURM job, or the task of a job array, that this process belongs to; it is the same after a requeue."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else os.environ.get("SLURM_JOB_ID", "")


def _numbers(folder: Path) -> list[int]:
    try:
        return sorted(int(found[1]) for name in os.listdir(folder) if (found := NAME.fullmatch(name)))
    except FileNotFoundError:
        return []


def _file(folder: Path, number: int) -> Path:
    return folder / f".run-{number}.lock"


def _me() -> dict[str, object]:
    return {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid()), "job": slurm_job()}


def _machine() -> str:
    """Host and, on Linux, process namespace: containers may share the name of their host and not its processes."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str:
    """When a process started, in ticks since the machine did, so that a later process of the same number differs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _read(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):  # it is just being written, or was cut off
        return {}
    return content if isinstance(content, dict) else {}


def _alive(path: Path) -> bool:
    """Whether the run of a lock is alive, as far as can be known from here."""
    owner = _read(path)
    if owner.get("machine") == _machine():
        pid = int(str(owner.get("pid", 0)))
        return process_runs(pid) and owner.get("started") == _started(pid)
    if owner.get("job") and owner["job"] == slurm_job():
        return False
    try:
        return _age(path) < STALE
    except FileNotFoundError:  # released just now
        return False


def _age(path: Path) -> float:
    """Seconds since the last sign of life, by the clock of the file system: clocks of hosts differ."""
    probe = path.with_name(f".{os.getpid()}.probe")
    try:
        probe.touch()
        now = probe.stat().st_mtime
    except OSError:
        now = time.time()
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return now - path.stat().st_mtime


def _in_use(folder: Path, path: Path) -> str:
    owner = _read(path)
    host = str(owner.get("machine", "another host")).partition(" ")[0]
    return (
        f"Another run is writing into {folder} (process {owner.get('pid', '?')} on {host}); wait for its end, or give "
        f"another folder with --trainer.default_root_dir. If that run is dead, it is known {STALE / 60:.0f} minutes "
        "after its last sign of life."
    )
