"""``lssl show``: tables, curves, comparisons, and sentences for folders that hold no run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from lssl.cli.main import main
from lssl.runs.log import better, ordered_kinds, ordered_taps, read_run

HEAD = "epoch,monitor/rank/encoder.0,monitor/rank/decoder.1,monitor/rank/decoder.10,monitor/shortcut/decoder.1,step"
ROWS = f"""{HEAD},train/loss,val/loss
,5.0,3.0,7.0,0.9,0,,
0,,,,,9,4.0,
0,,,,,9,,3.5
1,,,,,19,2.0,nan
,2.0,6.0,7.5,0.25,20,,
1,,,,,29,3.0,
"""


def folder(path: Path, text: str = ROWS, name: str = "metrics.csv") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(text)
    return path


def test_first_last_and_best_of_terms_and_monitors(tmp_path, capsys):
    run = folder(tmp_path / "run")
    (run / "config.yaml").write_text("model: {class_path: lssl.strategies.x.SomeMethod}")
    main(["show", str(run)])
    text = capsys.readouterr().out
    assert "run: SomeMethod, up to step 29" in text
    cells = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in text.splitlines()
        if "│" in line
    }
    assert cells["↓ train/loss"] == ["4", "3", "2"]
    assert cells["↓ val/loss"] == ["3.5", "3.5", "3.5"]
    assert cells["↑ rank"] == ["5 → 2 (5)", "7 → 7.5 (7.5)", "3 → 6 (6)"]  # encoder.0, decoder.10, decoder.1
    assert cells["↓ shortcut"] == ["–", "–", "0.9 → 0.25 (0.25)"]
    for name in ("terms", "monitors"):
        assert imread(run / "pictures" / f"{name}.png")[..., :3].std() > 0.02


def test_runs_side_by_side(tmp_path, capsys):
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two", "step,train/loss,train/extra\n4,1.5,7\n")
    main(["show", str(one), str(two), "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["↓ train/loss"].split("│")[2:4]] == ["3", "1.5"]
    assert "–" in rows["↓ train/extra"]
    assert "–" in rows["↑ rank decoder.1"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"terms.png", "monitors.png"}


def test_a_step_that_was_logged_twice_counts_once(tmp_path):
    run = folder(tmp_path / "run", "step,train/loss\n0,9\n10,8\n20,7\n10,5\n")
    steps, values = read_run(run).curves["train/loss"]
    np.testing.assert_array_equal(steps, [0, 10, 20])
    np.testing.assert_array_equal(values, [9, 5, 7])


def test_what_is_better_and_in_which_order(tmp_path):
    assert [better(name) for name in ("val/loss", "train/feature_std", "learning_rate")] == [-1, 0, 0]
    assert [better(f"monitor/{kind}/x") for kind in ("age", "alignment", "position", "new")] == [1, -1, 0, 0]
    text = "step," + ",".join(
        f"monitor/rank/{tap}" for tap in ("decoder.0", "decoder.2", "own", "bottleneck", "encoder.1")
    )
    run = read_run(folder(tmp_path / "run", f"{text},monitor/feature_std/own\n0,1,1,1,1,1,1\n"))
    assert ordered_taps([run]) == ["encoder.1", "bottleneck", "decoder.2", "decoder.0", "own"]
    assert ordered_kinds([run]) == ["feature_std", "rank"]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda base: folder(base / "demo") and base / "dmo", "no run folder"),
        (lambda base: folder(base / "demo") and base, "did you mean"),
        (lambda base: folder(base / "demo", ""), "damaged or empty"),
        (lambda base: folder(base / "demo", "a,b\n1,2\n"), "no column step"),
        (lambda base: folder(base / "demo", "step,train/loss\n1,\n"), "no figures yet"),
    ],
)
def test_what_is_no_run_ends_in_one_sentence(make, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["show", str(make(tmp_path))])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "demo" in said
    assert said.count("\n") == 1
    assert not list(tmp_path.rglob("*.png"))


def test_it_starts_without_torch(tmp_path):
    run = folder(tmp_path / "run")
    code = f"import sys; from lssl.cli.main import main; main(['show', {str(run)!r}]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


def test_figures_beside_the_loss_have_their_own_sense():
    """An agreement that rises is good; a share of matches is neither; terms of the loss fall."""
    senses = {"train/inter": -1, "train/inter/agreement": 1, "val/match/score": 0, "train/explained": 1, "val/dice": 1}
    senses |= {"train/feature_std": 0, "val/loss": -1, "learning_rate": 0, "monitor/rank/bottleneck": 1}
    assert {name: better(name) for name in senses} == senses


@pytest.mark.parametrize("content", [b"\xed\xff", b"[1, 2]", b"model: text", b"{", b"model: {class_path: [1]}"])
def test_a_config_that_is_none_costs_only_the_title(tmp_path, capsys, content):
    (tmp_path / "metrics.csv").write_text("step,epoch,train/loss\n1,0,2.0\n2,0,1.0\n")
    (tmp_path / "config.yaml").write_bytes(content)
    main(["show", str(tmp_path)])
    assert "train/loss" in capsys.readouterr().out
