"""Atomic writes, and fingerprints of files."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["atomic_write", "digest", "fingerprint", "read_json", "write_json"]


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path``; it is renamed to ``path`` when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=1))


def read_json(path: Path) -> Any:
    """The content of a JSON file; ``None`` if there is none or it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
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
