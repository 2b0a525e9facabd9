"""Who may import whom, and what `import lssl` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for room in ("lssl", "strategies", "datamodules") for path in (ROOT / room).rglob("*.py"))

# The floors of the house, the top one first. A room imports rooms of lower floors alone, so there is no cycle.
FLOORS = (
    ("__main__",),
    ("trajectories",),
    ("benchmark",),
    ("cli", "features"),
    ("lesions",),
    ("prediction",),
    ("callbacks", "datamodules", "export", "segmentation", "strategies"),
    ("correspondence", "evaluation"),
    ("checkpoint", "runs"),
    ("pictures",),
    ("timed_strategy",),
    ("strategy",),
    ("task",),
    ("guards", "prepare", "resume", "synthetic", "views"),
    ("data", "losses", "metrics", "networks"),
    ("utils",),
)
# Rooms that may import less than what lies below them. Methods and sources are found through entry points, so that a
# third party's package registers exactly as ours do: no room imports them.
ONLY = {
    "datamodules": {"data", "prepare", "synthetic", "utils"},
    "prepare": {"data", "utils"},
    "synthetic": {"data", "utils"},
    "losses": {"utils"},
    "metrics": {"utils"},
}
NEVER = {"strategies", "datamodules"}
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MAY_IMPORT = {room: ONLY.get(room, {other for other in FLOOR if FLOOR[other] > FLOOR[room]} - NEVER) for room in FLOOR}


def module_of(path: Path) -> list[str]:
    """Its dotted name; `strategies` and `datamodules` install under `lssl`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return [*(() if parts[0] == "lssl" else ("lssl",)), *parts]


def imported(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, also within functions and for type checkers alone."""
    package = module_of(path)[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level], node.module] if node.level else [node.module]
            base = ".".join(part for part in base if part)
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_only_whom_they_may(path: Path):
    module = module_of(path)
    if module == ["lssl", "__init__"]:
        return  # names the public classes of all rooms, and imports none of them before it is asked
    room = module[1]
    known = {name.split(".")[1] for name in imported(path) if name.startswith("lssl.")} - {"__version__"}
    assert known - {room} <= MAY_IMPORT[room]


METHODS = [path for path in FILES if path.parts[-2] == "strategies" and path.stem != "__init__"]


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_method_imports_no_other(path: Path):
    assert not [name for name in imported(path) if name.startswith("lssl.strategies")]


def test_every_room_has_a_floor():
    rooms = {module_of(path)[1] for path in FILES} - {"__init__"}
    assert rooms <= set(FLOOR), "name the new room in FLOORS, and in CONTRIBUTING.md"


@pytest.mark.parametrize("module", ["lssl", "lssl.utils.errors", "lssl.cli.main"])
def test_light_modules_import_nothing_heavy(module: str):
    code = f"import sys, {module}; print(*{{'torch', 'lightning', 'monai', 'numpy', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_preparation_and_the_tables_of_runs_need_no_torch():
    rooms = [path for room in ("prepare",) for path in sorted((ROOT / "lssl" / room).glob("*.py"))]
    rooms += [
        ROOT / "lssl/data" / f"{name}.py"
        for name in ("bids", "labels", "nifti", "pairs", "selection", "sidecars", "store", "tables", "times")
    ]
    rooms += [ROOT / "lssl/runs/outputs.py"]
    modules = ", ".join(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in rooms)
    code = (
        f"import sys, {modules.replace('.__init__', '')}; print(*{{'torch', 'lightning', 'monai'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_public_name_is_found_on_first_use():
    import lssl

    for name in lssl.__all__:
        assert getattr(lssl, name) is not None
    assert {"Strategy", "load_backbone", "__version__"} <= set(dir(lssl))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lssl.nothing  # noqa: B018
