"""Files are short, every package is installed, and the project's metadata stand in one place."""

from __future__ import annotations

import re
from importlib.metadata import metadata, version
from pathlib import Path

import pytest
import yaml
from test_imports import FILES, ROOT, module_of

import lssl

PYPROJECT = (ROOT / "pyproject.toml").read_text()
LONGEST = 350  # lines of a file


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long(path: Path):
    assert len(path.read_text().splitlines()) <= LONGEST, "two ideas in one file; give each its own"


def test_no_two_test_files_share_a_name():
    """pytest imports them by their name alone, and would collect one of the two."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert sorted(names) == sorted({*names})


def test_every_package_is_installed():
    """A folder that pyproject does not list would be missing from the wheel alone: the editable install has it."""
    listed = re.search(r"^packages = \[(.+?)\]$", PYPROJECT, re.MULTILINE | re.DOTALL)
    assert listed
    folders = {".".join(module_of(path.parent)) for path in FILES}
    assert sorted(re.findall(r'"([\w.]+)"', listed.group(1))) == sorted(folders | {"lssl.configs"})


def test_the_version_stands_in_one_place():
    assert version("lssl") == lssl.__version__
    assert re.search(r"^version\b.*\d+\.\d+\.\d+", PYPROJECT, re.MULTILINE) is None


def test_python_versions_are_those_that_were_tried():
    """A classifier promises a version: one that CI runs, or the one of the exact versions in constraints.txt."""
    promised = set(re.findall(r"Python :: (3\.\d+)", PYPROJECT))
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    tried = {
        version for job in ("test", "package") for version in workflow["jobs"][job]["strategy"]["matrix"]["python"]
    }
    tried |= set(re.findall(r"CPython (3\.\d+)", (ROOT / "constraints.txt").read_text()))
    assert promised == tried
    assert metadata("lssl")["Requires-Python"] == f">={min(promised, key=lambda v: int(v.split('.')[1]))}"
