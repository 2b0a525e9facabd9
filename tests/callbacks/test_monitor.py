"""The monitor in real runs: when it measures, what it writes, and that it sees a collapse and no other."""

from __future__ import annotations

import csv
import math
import warnings
from importlib.metadata import entry_points
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import ROOT, TINY_NET, few, fit

from lssl.cli.compose import compose
from lssl.cli.main import main
from lssl.datamodules.phantom import PhantomDataModule

COLLAPSE = str(Path(__file__).parent / "collapse.yaml")


def figures(run: Path, name: str) -> dict[int, float]:
    """Step → value."""
    with (run / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


@pytest.mark.slow
def test_it_measures_early_and_then_every_so_often_and_resumes(tmp_path):
    options = ["--monitor.every=4", "--trainer.max_steps=5", "--trainer.callbacks=null"]
    options += ["--data.init_args.split=[0.5,0.5,0.0]"]
    run = fit(tmp_path, "demo.yaml", options=options, backbone=TINY_NET)
    assert list(figures(run, "monitor/feature_std/decoder.0")) == [0, 1, 2, 4]
    assert {"rank", "matching", "shortcut", "retrieval", "dice"} <= {
        name.split("/")[1] for name in (run / "metrics.csv").read_text().splitlines()[0].split(",") if "monitor" in name
    }
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["RepresentationMonitor"]
    assert state["first"]["feature_std/decoder.0"] == pytest.approx(figures(run, "monitor/feature_std/decoder.0")[0])
    options[1] = "--trainer.max_steps=8"
    fit(tmp_path, "demo.yaml", options=[*options, "--ckpt_path=last"], backbone=TINY_NET)
    assert list(figures(run, "monitor/feature_std/decoder.0")) == [0, 1, 2, 4, 8]


@pytest.mark.parametrize("every", few([200, 0], 1))
def test_a_run_shorter_than_its_first_measurement_pays_nothing(every, tmp_path):
    options = [f"--monitor.every={every}", "--trainer.callbacks=null"]
    run = fit(tmp_path, "demo.yaml", options=options, backbone=TINY_NET)
    assert "monitor" not in (run / "metrics.csv").read_text()


class NothingHeldOut(L.LightningDataModule):
    """A user's own source of pairs, for training alone."""

    def train_dataloader(self):
        data = PhantomDataModule(subjects=2, visits=2, size=40, spacing=5.0, split=(1.0, 0.0, 0.0))
        data.setup("fit")
        return data.train_dataloader()


def test_without_held_out_pairs_it_says_so_and_training_goes_on(tmp_path):
    own = ["--data=test_monitor.NothingHeldOut", "--monitor.every=4"]
    small = [f"--model.init_args.{name}=8" for name in ("hidden", "projection", "samples")]
    options = [*own, "--model=LongitudinalLocal", *small, "--trainer.callbacks=lssl.callbacks.Pictures"]
    with pytest.warns(UserWarning, match="no held-out subjects"):
        run = fit(tmp_path, options=options, backbone=TINY_NET, data={"class_path": "test_monitor.NothingHeldOut"})
    assert "train/loss" in (run / "metrics.csv").read_text()


def test_a_bad_setting_is_one_sentence(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", COLLAPSE, "--monitor.subjects=1"])
    assert "subjects 2 or more" in capsys.readouterr().err


def collapse(tmp_path, *options: str) -> tuple[Path, list[str]]:
    """The run folder, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main(["fit", "--config", COLLAPSE, f"--trainer.default_root_dir={tmp_path / 'run'}", *options])
    return tmp_path / "run", [str(warning.message) for warning in caught]


@pytest.mark.slow
def test_a_strategy_made_to_collapse_raises_the_alarm_and_may_stop(tmp_path):
    """At the second measurement that shows it; of 100 steps."""
    run, said = collapse(tmp_path, "--monitor.stop=true")
    assert any(
        text.startswith("collapse at decoder.2, step 50: all features point one way (feature_std 0.0") for text in said
    )
    assert not any(text.startswith("collapse at encoder") for text in said)
    assert max(figures(run, "monitor/rank/decoder.2")) == 50


@pytest.mark.slow
def test_the_same_with_what_keeps_features_apart_raises_none(tmp_path):
    alive = ["--model.init_args.loss_weights={variance: 25.0, covariance: 1.0}", "--trainer.max_steps=25"]
    run, said = collapse(tmp_path, *alive, "--monitor.every=48", "--monitor.stop=true")
    assert not [text for text in said if "collapse" in text]
    assert figures(run, "monitor/feature_std/decoder.2")[24] > 0.1


SMALLER = {"prior_guided": ["--model.init_args.min_points=4"]}  # the bottleneck of 32³ views has 8 voxels
STRATEGIES = {entry.name for entry in entry_points(group="lssl.strategies")}
DEFAULTS = [
    (path.name, [])
    for path in sorted((ROOT / "configs").glob("*.yaml"))
    if path.name != "demo.yaml" and compose([str(path)]).values["model"]["class_path"].split(".")[-1] in STRATEGIES
]
DEFAULTS += [
    ("global_contrastive.yaml", [f"--model.init_args.objective={name}"]) for name in ("SimCLR", "BYOL", "VICReg")
]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "options"), DEFAULTS, ids=lambda value: "".join(value))
def test_no_strategys_default_raises_the_alarm_in_500_steps(config, options, tmp_path):
    """On small views and a small U-Net; everything else as shipped."""
    small = str(Path(__file__).parent / "small.yaml")
    options = [*options, *(option for part, more in SMALLER.items() if config.startswith(part) for option in more)]
    args = ["fit", "--config", str(ROOT / "configs" / config), "--config", small, *options]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main([*args, f"--trainer.default_root_dir={tmp_path / 'run'}"])
    assert not [warning for warning in caught if str(warning.message).startswith("collapse")]
    spread = figures(tmp_path / "run", "monitor/feature_std/bottleneck")
    assert list(spread) == [0, 50, 100, 200, 400]
    assert all(math.isfinite(value) for value in spread.values())
