"""write_torch: ``torch.save`` that is atomic, and says in one sentence that a disk is full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lssl.utils.files import atomic_write, writing_failed

__all__ = ["write_torch"]


def write_torch(path: Path, content: Any, sync: bool = False) -> None:
    """Writes what ``torch.load`` reads.

    Given a path, ``torch.save`` hides why a write failed; given a file, the reason can be found.

    Args:
        path: the file; the earlier one stays until the new one is whole.
        content: anything that torch saves.
        sync: also waits until the file is on the disk.

    Raises:
        InputError: if the disk is full and the like.
    """
    try:
        with atomic_write(path, sync) as part, open(part, "wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        if mistake := writing_failed(path, error):
            raise mistake from error
        raise
