"""The last lines of a command: where its files are, and what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

__all__ = ["say_next"]


def say_next(folder: Path | None, *commands: Sequence[str]) -> None:
    """Prints the folder of a command's files, and commands that can be pasted.

    Args:
        folder: ``None`` if no file was written.
        *commands: words of each, without ``lssl``.
    """
    if folder is not None:
        print(f"Folder: {folder}")
    for number, words in enumerate(commands):
        print(f"{'      ' if number else 'Next: '}lssl {shlex.join(words)}", flush=True)
