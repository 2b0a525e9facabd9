"""The notebook: its code runs, its outputs are of that code, and it is small."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from helpers import ROOT

from lssl.cli.help import COMMANDS

(NOTEBOOK,) = (ROOT / "docs/notebooks").glob("*.ipynb")
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def printed() -> str:
    outputs = [output for cell in CELLS for output in cell.get("outputs", [])]
    return "".join("".join(output.get("text", [])) for output in outputs)


def test_its_commands_exist_and_its_files_are_shipped():
    """The words of each `main([...])` that are texts: a command, and recipes."""
    calls = [node for text in CODE for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    words = [call.args[0].elts for call in calls if isinstance(call.func, ast.Name) and call.func.id == "main"]
    assert len(words) == 3
    assert all(found[0].value in COMMANDS for found in words)
    named = re.findall(r'"--config", "([^"]+)"', "\n".join(CODE))
    assert all((ROOT / f"configs/{name}.yaml").is_file() for name in named if not name.startswith("runs/"))


def test_it_holds_outputs_without_errors_and_is_small():
    kinds = [output["output_type"] for cell in CELLS for output in cell.get("outputs", [])]
    assert "error" not in kinds
    assert [cell["execution_count"] for cell in CELLS if cell["cell_type"] == "code"] == list(range(1, len(CODE) + 1))
    assert NOTEBOOK.stat().st_size < 600_000
    assert str(Path.home()) not in NOTEBOOK.read_text()
    other, chance = (float(re.search(rf"{name} +([\d.]+) mm", printed())[1]) for name in ("other visit", "chance"))
    assert other < chance / 2


@pytest.mark.slow
def test_its_code_runs(tmp_path, monkeypatch, capsys):
    """With fewer steps and heads; what is printed then is not looked at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict = {"__name__": "notebook"}
    for text in CODE:
        short = re.sub(r"trainer\.max_steps=\d+", "trainer.max_steps=2", text).replace(
            '"subjects": 12', '"subjects": 8'
        )
        exec(compile(short, str(NOTEBOOK), "exec"), names)
    assert names["errors"]["visits/median"] > 0
    assert (tmp_path / "runs/finetune/test").is_dir()
