"""A small cohort, and `lssl prepare` on it as a user runs it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from scans import image_path, rigid, save, scan

from lssl.cli.main import main

SPACING = ["--spacing", "8"]


def make_cohort(root: Path) -> Path:
    """Subject a with two visits, moved in the scanner; b and c with one."""
    visits = [("a", "M000"), ("a", "M012"), ("b", "M000"), ("c", "M000")]
    for number, (name, session) in enumerate(visits):
        volume = scan(rigid(3.0 * number, 8.0, number), (8.0, 8.0, 8.0), number, subject=ord(name))
        save(volume, image_path(root, name, session))
    (root / "participants.tsv").write_text("participant_id\tage\tsite\nsub-a\t61.5\tnorth\nsub-b\t70\tsouth\n")
    return root


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """A cohort and what one plain run makes of it."""
    folder = tmp_path_factory.mktemp("master")
    make_cohort(folder / "bids")
    main(["prepare", str(folder / "bids"), str(folder / "out"), *SPACING])
    return folder


@pytest.fixture
def bids(master, tmp_path):
    """A copy of the cohort to change."""
    return Path(shutil.copytree(master / "bids", tmp_path / "bids"))


def prepare(bids: Path, out: Path, *options: str) -> int:
    """The exit status."""
    try:
        main(["prepare", str(bids), str(out), *SPACING, *options])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
