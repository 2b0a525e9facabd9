"""The site is built strictly where mkdocs is installed, and names every page."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from test_readme import DOCS


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
    made = {"contributing.md", "security.md"}
    made |= {f"notebooks/{notebook.stem}.md" for notebook in (ROOT / "docs/notebooks").glob("*.ipynb")}
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
