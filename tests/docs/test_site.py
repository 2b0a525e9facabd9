"""The site is built strictly where mkdocs is installed; the notebook's code runs, and what was committed is small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from test_readme import DOCS

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
LARGEST = 1_000_000  # bytes of a notebook


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without importing what it names."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda *_: None)


def test_every_page_is_in_the_navigation():
    pages: list[str] = []

    def collect(node):
        if isinstance(node, str):
            pages.append(node)
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            collect(child)

    collect(yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)["nav"])
    written = {str(page.relative_to(ROOT / "docs")) for page in DOCS}
    made = {f"notebooks/{path.stem}.md" for path in NOTEBOOKS} | {"contributing.md", "security.md"}
    assert sorted(pages) == sorted(written | made)


def test_every_strategy_has_a_page():
    methods = {path.stem for path in (ROOT / "strategies").glob("*.py")} - {"__init__"}
    assert {page.stem for page in DOCS if page.parent.name == "strategies"} == methods


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra docs; `make docs` builds the site in CI")
def test_the_site_is_built_without_a_warning(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "<math" in (tmp_path / "strategies/longitudinal_local.html").read_text()
    assert "number of corresponding voxels per tap" in (tmp_path / "strategies/longitudinal_local.html").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_executed_and_is_small(path: Path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run it from the top"
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
    assert path.stat().st_size < LARGEST


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_code_of_a_notebook_runs(path: Path, tmp_path: Path):
    """As a program of its own, so that it needs no kernel; nbclient ran what is committed."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    program = tmp_path / "cells.py"
    program.write_text("\n\n".join("".join(cell["source"]) for cell in cells))
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "MPLBACKEND": "Agg"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "off by" in done.stdout
