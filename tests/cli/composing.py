"""What tests of composition share."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from lssl.cli.main import main

CONFIGS = ROOT / "configs"


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


@pytest.fixture
def prepared(tmp_path) -> Path:
    """What is read of a prepared folder before training: its table and description."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    lines = ["subject,session,image,flags", "sub-1,ses-1,a,", "sub-1,ses-2,b,blurred", "sub-2,ses-1,c,"]
    write(folder / "visits.csv", "\n".join(lines) + "\n")
    write(folder / "dataset.json", '{"settings": "x", "options": {}}')
    return folder


def parsed(capsys, *args: str) -> dict:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args, "--print_config"])
    assert not stop.value.code
    return yaml.safe_load(capsys.readouterr().out)
