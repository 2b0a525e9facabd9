"""From README to a benchmarked row: the method of README and the plan of docs/extending.md, in 30 lines together."""

import pandas as pd
import pytest
from test_readme import DOCS, README, blocks

from lssl.benchmark.checks import check_cells
from lssl.benchmark.plan import read_plan
from lssl.cli.main import main

LINES = 30


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """The two files, as the pages have them, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    page = next(page for page in DOCS if page.name == "extending.md")
    shown = [*blocks(README, "python"), *blocks(page, "yaml")]
    named = {text.split("\n")[0].removeprefix("# "): text for text in shown}
    found = {name: named[name] for name in ("my_methods.py", "plan.yaml")}
    for name, text in found.items():
        (tmp_path / name).write_text(text)
    return found


def test_thirty_lines_make_a_plan_that_resolves(texts, tmp_path):
    assert sum(len(text.splitlines()) for text in texts.values()) <= LINES
    plan = read_plan(tmp_path / "plan.yaml")
    check_cells(plan, plan.cells)
    assert {cell.strategy for cell in plan.cells} >= {"my_order", "scratch"}


@pytest.mark.slow
def test_one_command_makes_the_row(texts, tmp_path, capsys):
    main(["benchmark", "--config", "plan.yaml", "--jobs", "2"])
    assert "my_order" in capsys.readouterr().out
    assert "my_order" in (tmp_path / "rows/table.md").read_text()
    rows = pd.read_csv(tmp_path / "rows/results.csv")
    dice = rows[(rows["metric"] == "dice") & (rows["strategy"] == "my_order")]
    assert len(dice)
    assert dice["value"].between(0, 1).all()
