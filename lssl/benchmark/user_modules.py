"""The source files of a user's own modules, and of those that they import; nothing is imported, and no torch."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import entry_points
from pathlib import Path

__all__ = ["search_folders", "user_sources"]

INSTALLED = {"site-packages", "dist-packages"}
GROUPS = ("lssl.strategies", "lssl.datamodules")


def user_sources(name: str, folders: Sequence[Path]) -> list[Path]:
    """Files of the module of a class path (or registered short name), and of everything it imports.

    Modules of the standard library, of ``site-packages`` and of lssl are left out: versions stand for them.

    Args:
        name: such as ``my_methods.VisitOrder``.
        folders: searched before ``sys.path``.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        return []
    modules = [name] if "." in name else [p.module for group in GROUPS for p in entry_points(group=group, name=name)]
    found: dict[Path, None] = {}
    waiting = list(modules)
    seen: set[str] = set()
    while waiting:
        dotted = waiting.pop()
        if dotted in seen:
            continue
        seen.add(dotted)
        for module, path in _files(dotted, folders):
            if path not in found:
                found[path] = None
                waiting += _imported(module, path)
    return sorted(found)


def _files(dotted: str, folders: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Modules along a dotted name with their files; trailing parts may be classes or functions."""
    first, *rest = dotted.split(".")
    spec = _find(first, folders)
    for part in [*rest, None]:
        if spec is None:
            return
        if spec.origin and spec.origin.endswith(".py"):
            yield spec.name, Path(spec.origin).resolve()
        if part is None or not spec.submodule_search_locations:
            return
        places = list(spec.submodule_search_locations)
        spec = PathFinder.find_spec(f"{spec.name}.{part}", places)


def _find(first: str, folders: Sequence[Path]) -> ModuleSpec | None:
    """Of a user's top-level module."""
    if first == "lssl" or first in sys.stdlib_module_names:
        return None
    spec = PathFinder.find_spec(first, [str(folder) for folder in folders])
    if spec is None:
        try:
            spec = importlib.util.find_spec(first)
        except (ImportError, ValueError):
            return None
    if spec is None:
        return None
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
    return None if any(INSTALLED & {*Path(place).parts} for place in places if place) else spec


def _imported(module: str, path: Path) -> Iterator[str]:
    """Dotted names in the import statements of a file, wherever they stand in it."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return  # whoever runs it says so
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*filter(None, above), *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" if base else alias.name for alias in node.names)


def search_folders(beside: Path) -> list[Path]:
    """Where the cells' processes look first: here, beside the plan, and along PYTHONPATH."""
    more = [Path(text) for text in os.environ.get("PYTHONPATH", "").split(os.pathsep) if text]
    return [Path.cwd(), beside.resolve(), *more]
