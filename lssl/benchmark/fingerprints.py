"""Whether a finished cell is the one that is asked for: a hash of its config, its data and the code; without torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lssl.benchmark.plan import Plan
from lssl.utils.files import digest, fingerprint

__all__ = ["cell_fingerprints", "code_version"]

LIBRARIES = ("torch", "lightning", "monai")
TABLES = ("visits.csv", "dataset.json")  # of a prepared folder: they change whenever a visit does


def cell_fingerprints(plan: Plan) -> dict[str, str]:
    """Key of each cell by its name.

    Defaults that a config leaves out are code, so config and code version together are the resolved config. Where the
    output folder lies is of no account. A fine-tuning key contains its pretraining's.
    """
    fingerprints: dict[str, str] = {}
    for cell in plan.cells:
        parts = [
            _without(cell.config, str(plan.out)),
            [data_fingerprint(value) for value in _texts(cell.config.get("data"))],
            code_version(),
            [
                user_file(value, plan.path.parent)
                for value in _texts([cell.config.get(group) for group in ("model", "data", "backbone")])
            ],
            fingerprints.get(cell.needs or "", ""),
        ]
        fingerprints[cell.name] = digest(parts)
    return fingerprints


@cache
def code_version() -> str:
    """Hash of all sources but this room's, and of the versions of what they stand on."""
    folders = {
        Path(folder)
        for package in ("lssl", "lssl.strategies", "lssl.datamodules")
        if (spec := importlib.util.find_spec(package)) and spec.submodule_search_locations
        for folder in spec.submodule_search_locations
    }
    here = Path(__file__).parent
    files = sorted({path for folder in folders for path in folder.rglob("*.py") if here not in path.parents})
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return digest([versions, [[path.name, path.read_text()] for path in files]])


@cache
def data_fingerprint(value: str) -> Any:
    """What a path in the data's settings holds: a file's content, a folder's table, or its files' names and sizes."""
    path = Path(value)
    if path.is_file():
        return fingerprint(str(path))["hash"]
    if not path.is_dir():
        return None
    if tables := [name for name in TABLES if (path / name).is_file()]:
        return {name: fingerprint(str(path / name))["hash"] for name in tables}
    return [
        [os.path.relpath(os.path.join(folder, name), path), status.st_size, status.st_mtime_ns]
        for folder, _, names in sorted(os.walk(path))
        for name in sorted(names)
        if (status := os.stat(os.path.join(folder, name)))
    ]


@cache
def user_file(value: str, beside: Path) -> str | None:
    """Hash of the file that a class path such as ``my_methods.VisitOrder`` names, beside the plan or here."""
    parts = value.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return None
    for folder in (Path.cwd(), beside):
        path = folder.joinpath(*parts[:-1]).with_suffix(".py")
        if path.is_file():
            return fingerprint(str(path))["hash"]
    return None


def _texts(content: Any) -> Iterator[str]:
    """All texts within settings."""
    if isinstance(content, str):
        yield content
    for value in content.values() if isinstance(content, Mapping) else content if isinstance(content, list) else ():
        yield from _texts(value)


def _without(content: Any, folder: str) -> Any:
    """Settings with the output folder taken out of their paths."""
    if isinstance(content, str):
        return content.replace(folder, "OUT")
    if isinstance(content, Mapping):
        return {key: _without(value, folder) for key, value in content.items()}
    return [_without(value, folder) for value in content] if isinstance(content, list) else content
