"""Atomic writes, damaged and failed files, and fingerprints of files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lssl.utils.errors import InputError

__all__ = [
    "atomic_write",
    "check_temporary",
    "damage",
    "digest",
    "fingerprint",
    "process_runs",
    "read_json",
    "refuse_damaged",
    "remove_parts",
    "write_json",
    "writing_failed",
]

PART = re.compile(r"\.(?P<name>.+)\.(?P<host>[^/]+)\.(?P<pid>\d+)\.part")
ABANDONED = 3600.0  # seconds after which another host's temporary file, which is not growing, has no writer
REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "the file is larger than files may be here (ulimit -f)",
    errno.EROFS: "the file system can only be read",
    errno.EACCES: "there is no permission to write there",
    errno.EPERM: "there is no permission to write there",
    errno.ENOENT: "its folder is gone",
    errno.ENOTDIR: "a part of the path is a file",
    errno.ESTALE: "the network's file system has lost the file",
    errno.EIO: "the disk reports an error",
    errno.EMFILE: "this process has too many open files (ulimit -n)",
}


@contextmanager
def atomic_write(path: Path, sync: bool = False) -> Iterator[Path]:
    """A temporary file beside ``path``; it is renamed to ``path`` when it is complete.

    Whatever ends the process, ``path`` is the old file or the new one. A killed process leaves its temporary file;
    see :func:`remove_parts`.

    Args:
        path: the file.
        sync: also waits until the new file is on the disk, so that this holds if the machine loses power.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        yield part
        if sync:
            _sync(part)
        os.replace(part, path)
        if sync:
            with suppress(OSError):  # the renaming is done; some file systems cannot sync a folder
                _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_parts(folder: Path) -> None:
    """Removes temporary files of :func:`atomic_write` that killed processes left in a folder.

    Those of another host go when they have not changed for an hour, as their process cannot be asked.
    """
    for path in folder.glob(".*.part"):
        found = PART.fullmatch(path.name)
        with suppress(OSError):  # a writer has just finished, or the folder can only be read
            if not found:
                continue
            here = found["host"] == socket.gethostname()
            if (here and not process_runs(int(found["pid"]))) or time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()


def process_runs(pid: int) -> bool:
    """Whether a process of this machine is running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def damage(path: Path) -> str | None:
    """Why a file of ``torch.save`` is not what was written; ``None`` if it is whole.

    Such a file is a zip archive, which holds a CRC-32 of every record. ``torch.load`` does not compare them, so it
    reads flipped bits as weights. The checksums travel with the file. About 2 s per GB.
    """
    if not path.stat().st_size:
        return "it is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except FileNotFoundError:
        raise
    except zipfile.BadZipFile:
        return "it is truncated or damaged"
    except Exception as error:  # a damaged directory misleads the reader in many ways
        return f"it cannot be read ({error})"
    return f"the checksum of {bad} is wrong" if bad else None


def refuse_damaged(path: Path) -> None:
    """Refuses a damaged checkpoint, and names the whole ones beside it, the latest first.

    Args:
        path: an existing file that Lightning wrote.
    """
    reason = damage(path)
    if reason is None:
        return
    others = [other for other in path.parent.glob("*.ckpt") if other != path and damage(other) is None]
    others.sort(key=lambda other: other.stat().st_mtime, reverse=True)
    names = " or ".join(f"--ckpt_path {_short(other)}" for other in others)
    advice = f"go on with {names}" if others else "no other checkpoint lies beside it, so the run must start again"
    raise InputError(f"{path} is damaged ({reason}); {advice}.")


def _short(path: Path) -> str:
    return path.stem if path.name in ("best.ckpt", "last.ckpt") else str(path)


def writing_failed(path: Path, error: BaseException | None) -> InputError | None:
    """One sentence for a failed write, if the machine is the reason and not the program.

    Args:
        path: what was being written.
        error: of the write. What it was raised from, or during, counts: ``torch.save`` hides the reason.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in REASONS:
            return InputError(f"{path} could not be written: {REASONS[error.errno]}.")
        error = error.__cause__ or error.__context__
    return None


def check_temporary() -> None:
    """Refuses to go on where no file of 4 kB can be written into the folder for temporary files."""
    try:
        with tempfile.TemporaryFile() as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        at = f" ({tempfile.tempdir})" if tempfile.tempdir else ""
        raise InputError(
            f"There is no folder for temporary files{at} that can be written, and processes need one to start: "
            f"{error.strerror or error}. Set TMPDIR to a folder with free space."
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=1))


def read_json(path: Path) -> Any:
    """The content of a JSON file; ``None`` if there is none or it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def digest(content: Any) -> str:
    """A short hash of anything JSON can hold."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=12).hexdigest()


def fingerprint(path: str, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Size, time of change and content hash of a file.

    Args:
        path: the file.
        known: its earlier fingerprint: while size and time are the same, the content is not read again.
    """
    status = os.stat(path)
    now: dict[str, Any] = {"size": status.st_size, "changed": status.st_mtime_ns}
    if known and all(known.get(name) == value for name, value in now.items()):
        return known
    hashed = hashlib.blake2b(digest_size=12)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hashed.update(block)
    return {**now, "hash": hashed.hexdigest()}
