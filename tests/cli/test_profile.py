"""lssl profile: the account leaves the traced steps out, the trace names the phases, and the table is of own times."""

import gzip
import json
import re
from types import SimpleNamespace

import pytest
from helpers import ROOT, TINY_NET, sentence, tiny

from lssl.callbacks.trace import TRACE, operations_table
from lssl.cli import profile
from lssl.cli.completion import words
from lssl.cli.main import main
from lssl.runs.outputs import read_cost


def test_a_run_is_profiled(tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr(profile, "WARM_UP", 1)
    monitored = {"backbone": TINY_NET, "monitor": {"every": 1}}
    recipe = ["--config", str(ROOT / "configs/longitudinal_infonce.yaml")]
    run = tmp_path / "profile"  # the folder of the config would be that of a run
    main(["profile", *recipe, *tiny(tmp_path, **monitored), "--steps", "2", f"--trainer.default_root_dir={run}"])
    cost = read_cost(run)
    assert cost is not None
    assert cost.steps == 3
    assert max(cost.validation, cost.monitor, cost.checkpoints) < 0.01
    events = json.loads(gzip.decompress((run / TRACE).read_bytes()))["traceEvents"]
    spans = [event for event in events if event.get("cat") == "user_annotation"]
    assert [event["name"] for event in spans].count("views") == profile.TRACED
    views = next(event for event in spans if event["name"] == "views")
    inside = [one for one in events if one.get("cat") == "cpu_op" and 0 < one["ts"] - views["ts"] < views["dur"]]
    assert any("grid_sampler" in event["name"] for event in inside)
    said = caplog.text
    assert "What training took (3 steps" in said
    rows = re.findall(r"^  (\S+) +([\d.]+) +\d+% +[\d.e+]+$", said, re.MULTILINE)
    assert len(rows) == 10
    assert [float(ms) for _, ms in rows] == sorted((float(ms) for _, ms in rows), reverse=True)
    assert capsys.readouterr().out.rstrip().endswith(f"Folder: {run}")


def operation(key: str, own: float, count: int, span: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        key=key, self_cpu_time_total=own, self_device_time_total=2 * own, count=count, is_user_annotation=span
    )


def test_the_table_is_of_a_step_and_leaves_spans_out():
    found = [operation("aten::mm", 3000.0, 4), operation("views", 9000.0, 2, span=True), operation("x" * 90, 9000.0, 8)]
    text = operations_table(found, steps=2, top=10, device=False).splitlines()
    assert text[0].startswith("What takes most of 2 kinds")
    assert text[2].split() == ["x" * 59 + "…", "4.50", "75%", "4"]
    assert text[3].split() == ["aten::mm", "1.50", "25%", "2"]
    assert "GPU ms/step" in operations_table(found, 2, 10, device=True)
    assert "9.00" in operations_table(found, 2, 10, device=True)


def test_its_options_are_checked_and_completed(capsys):
    assert "--steps is 0" in sentence(capsys, "profile", "--config", "demo", "--steps", "0")
    assert {"--steps", "--config", "--trainer.precision"} <= {*words()[1]["profile"]}
    assert "longitudinal_infonce" in words()[1]["profile --config"]
    with pytest.raises(SystemExit):
        main(["profile", "--help"])
    assert "--key value" in capsys.readouterr().out
