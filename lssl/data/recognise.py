"""What a path holds: which datamodule reads it, told from names alone."""

from __future__ import annotations

from pathlib import Path

__all__ = ["is_prepared"]


def is_prepared(root: str | Path | None) -> bool:
    """Whether ``lssl prepare`` wrote this folder."""
    return root is not None and (Path(root) / "dataset.json").is_file() and (Path(root) / "visits.csv").is_file()
