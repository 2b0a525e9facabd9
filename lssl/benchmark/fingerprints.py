"""Fingerprints of cells: a hash of the config and of everything that a cell reads; without torch.

A cell reads what its config names: files (a matcher's checkpoint, pretrained weights, a table), folders of data, the
images that a table lists, and classes of the user's own modules with everything these import. :func:`cell_inputs` lists
them with their hashes; ``OUT/cells/…/inputs.json`` keeps the list of each cell.
"""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lssl.benchmark.plan import Cell, Plan
from lssl.benchmark.user_modules import search_folders, user_sources
from lssl.utils.files import digest, fingerprint

__all__ = ["Inputs", "cell_fingerprints", "cell_inputs", "code_version"]

LIBRARIES = ("torch", "lightning", "monai")
TABLES = ("visits.csv", "dataset.json")  # of a prepared folder: they change with every visit
SMALL = 1 << 20  # bytes; larger images are identified by size and time of change
_known: dict[str, dict[str, Any]] = {}


def cell_fingerprints(plan: Plan) -> dict[str, str]:
    """Cell name → fingerprint.

    Omitted defaults are part of the code, so config and code version determine the resolved config. The location of the
    output folder does not matter. The fingerprint of fine-tuning includes that of its pretraining.
    """
    fingerprints: dict[str, str] = {}
    inputs = Inputs(plan)
    for cell in plan.cells:
        parts = [
            _without(cell.config, str(plan.out)),
            inputs.of(cell),
            code_version(),
            fingerprints.get(cell.needs or "", ""),
        ]
        fingerprints[cell.name] = digest(parts)
    return fingerprints


def cell_inputs(plan: Plan, cell: Cell) -> dict[str, Any]:
    """Inputs of a cell besides lssl's own code: path → hash, or ``[size, time of change]`` of a large image."""
    return Inputs(plan).of(cell)


@cache
def code_version() -> str:
    """Hash of all sources except this room's, and of the versions of the libraries."""
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


class Inputs:
    """Inputs of the cells of a plan; each path is read once.

    Args:
        plan: the cells. Files in its output folder are made by the cells and are no inputs.
    """

    def __init__(self, plan: Plan) -> None:
        self.out = plan.out.resolve()
        self.folders = search_folders(plan.path.parent)
        self._paths: dict[tuple[str, bool, tuple[str, ...]], dict[str, Any]] = {}
        self._modules: dict[str, dict[str, Any]] = {}

    def of(self, cell: Cell) -> dict[str, Any]:
        """Path → hash of one cell's inputs."""
        found: dict[str, Any] = {}
        roots = tuple(text for text in _texts(cell.config.get("data")) if os.path.isdir(text))
        for group, content in cell.config.items():
            for text in _texts(content):
                key = (text, group == "data", roots)
                if key not in self._paths:
                    self._paths[key] = self._path(*key)
                if text not in self._modules:
                    paths = user_sources(text, self.folders)
                    self._modules[text] = {self._name(path): _content(path) for path in paths}
                found |= self._paths[key] | self._modules[text]
        return dict(sorted(found.items()))

    def _path(self, text: str, is_data: bool, roots: tuple[str, ...]) -> dict[str, Any]:
        """A file that a setting names, and the files of a table or of a data folder."""
        path = Path(text)
        try:
            if not path.exists() or self.out in (path.resolve(), *path.resolve().parents):
                return {}
        except OSError:  # no path at all: a name that is too long
            return {}
        if path.is_file():
            listed = _listed(path, roots) if is_data and path.suffix in (".csv", ".tsv") else {}
            return {text: _content(path), **listed}
        return _folder(path) if is_data and path.is_dir() else {}

    def _name(self, path: Path) -> str:
        """A path that does not depend on the location of the project."""
        for folder in self.folders:
            if folder.resolve() in path.parents:
                return str(path.relative_to(folder.resolve()))
        return path.name


def _listed(table: Path, roots: tuple[str, ...]) -> dict[str, Any]:
    """The files that the cells of a table name, relative to a folder of the data's settings or to the table's own."""
    found = {}
    with table.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        for row in csv.reader(file, delimiter="\t" if table.suffix == ".tsv" else ","):
            for text in filter(_like_a_path, row):
                for root in (*map(Path, roots), table.parent):
                    path = root / text
                    if path.is_file():
                        found[str(path)] = _light(path)
                        break
    return found


def _like_a_path(text: str) -> bool:
    return "." in text and len(text) < 1024 and "\0" not in text


def _folder(path: Path) -> dict[str, Any]:
    """A prepared folder's tables and fields of motion, or sizes and times of all files of another one."""
    if tables := [name for name in TABLES if (path / name).is_file()]:
        fields = {str(path / "fields"): _sizes(path, files)} if (files := _fields(path / TABLES[0])) else {}
        return {**{str(path / name): _content(path / name) for name in tables}, **fields}
    return {str(path): _sizes(path, (Path(folder, name) for folder, _, names in os.walk(path) for name in names))}


def _fields(table: Path) -> list[Path]:
    """Files of the column ``field`` of a prepared folder: they can be made again while its tables stay."""
    if not table.is_file():
        return []
    with table.open(newline="", encoding="utf-8") as file:
        files = [table.parent / row["field"] for row in csv.DictReader(file) if row.get("field")]
    return [path for path in files if path.is_file()]


def _sizes(path: Path, files: Iterable[Path]) -> str:
    return digest([[os.path.relpath(file, path), *_size(file)] for file in sorted(files)])


def _size(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _light(path: Path) -> Any:
    return _content(path) if path.stat().st_size <= SMALL else _size(path)


def _content(path: Path) -> str:
    name = str(path.resolve())
    _known[name] = fingerprint(name, _known.get(name))
    return str(_known[name]["hash"])


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
