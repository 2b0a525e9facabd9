"""Who may import whom, and what `import lssl` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FREE = ("lssl/cli", "lssl/benchmark")  # the only rooms that know all the others
FILES = sorted(path for room in ("lssl", "strategies", "datamodules") for path in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Absolute names of everything that a file imports; `strategies` and `datamodules` install under `lssl`."""
    here = path.relative_to(ROOT).with_suffix("").parts
    package = [*(() if here[0] == "lssl" else ("lssl",)), *here][:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level], node.module] if node.level else [node.module]
            base = ".".join(part for part in base if part)
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_know_only_whom_they_may(path: Path):
    file, names = str(path.relative_to(ROOT)), imported(path)
    room = path.relative_to(ROOT).parts[0]
    methods = {name for name in names if name.startswith("lssl.strategies")}
    sources = {name for name in names if name.startswith("lssl.datamodules")}
    if room == "lssl" and not file.startswith(FREE):
        assert not methods | sources
    if room == "strategies":
        assert not sources
        assert not methods
    if room == "datamodules":
        ours = {name for name in names if name.startswith("lssl.")} - sources
        assert not {
            name for name in ours if not name.startswith(("lssl.data", "lssl.synthetic", "lssl.utils", "lssl.prepare"))
        }


@pytest.mark.parametrize("module", ["lssl", "lssl.utils.errors", "lssl.cli.main"])
def test_light_modules_import_nothing_heavy(module: str):
    code = f"import sys, {module}; print(*{{'torch', 'lightning', 'monai', 'numpy', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_preparation_needs_no_torch():
    rooms = [path for room in ("prepare",) for path in sorted((ROOT / "lssl" / room).glob("*.py"))]
    rooms += [ROOT / "lssl/data" / f"{name}.py" for name in ("nifti", "pairs", "store", "tables")]
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
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lssl.nothing  # noqa: B018
