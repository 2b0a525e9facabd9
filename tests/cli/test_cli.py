"""The command line: help, listing, runs, resuming, evaluation, prediction, and a user's own method."""

import platform
import subprocess
import sys
from importlib.metadata import version

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, TINY_NET, VISIT_ORDER, fit, resolved, tiny

from lssl import __version__
from lssl.cli.main import main

DEMO = str(ROOT / "configs/demo.yaml")
QUIET = ["--trainer.callbacks=null"]


def lssl(*args, cwd=None):
    return subprocess.run([sys.executable, "-m", "lssl", *args], capture_output=True, text=True, cwd=cwd, check=False)


def test_help_imports_nothing_heavy():
    """Which makes it quick; `benchmarks/bench_start.py` measures how quick."""
    heavy = ("torch", "lightning", "monai", "jsonargparse", "numpy", "pandas", "matplotlib", "rich")
    code = "import sys; from lssl.cli.main import main; main(['--help']); "
    code += f"print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "lssl fit" in result.stdout
    assert result.stdout.rstrip().endswith("[]")


@pytest.mark.smoke
def test_version_and_lists(capsys):
    for command in ("--version", "strategies", "datamodules"):
        main([command])
    text = capsys.readouterr().out
    assert "LongitudinalLocal" in text
    assert "NeurIPS 2022" in text
    assert "PhantomDataModule" in text
    assert "NiftiDataModule" in text
    assert text.startswith(f"lssl {__version__}\n")
    assert f"torch {torch.__version__}, lightning {L.__version__}, monai {version('monai')}" in text
    assert f"python {platform.python_version()}" in text
    assert "wandb absent" in text or f"wandb {version('wandb')}" in text
    assert ("CUDA" in text) == torch.cuda.is_available()


def test_print_config_round_trips(capsys, tmp_path):
    first = resolved(capsys, "--config", DEMO)
    (tmp_path / "c.yaml").write_text(first)
    assert yaml.safe_load(resolved(capsys, "--config", str(tmp_path / "c.yaml"))) == yaml.safe_load(first)


def test_interpolation_within_a_config(capsys, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("views: {size: 48}\ndata: {class_path: PhantomDataModule, init_args: {size: '${views.size}'}}\n")
    config = yaml.safe_load(resolved(capsys, "--config", DEMO, "--config", str(path)))
    assert config["data"]["init_args"]["size"] == 48


@pytest.mark.smoke
def test_shipped_configs_are_found_from_any_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "LongitudinalLocal" in resolved(capsys, "--config", "configs/demo.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished tiny run."""
    return fit(tmp_path_factory.mktemp("cli"), "demo.yaml", backbone=TINY_NET)


def test_report_compares_with_the_untrained_network(run):
    import json

    report = json.loads((run / "report.json").read_text())
    assert report["untrained"].keys() == report["trained"].keys()
    for kind in ("retrieval", "rank", "shortcut", "position"):
        assert f"{kind}/decoder.0" in report["trained"]
    assert report["untrained"]["term/similarity"] != report["trained"]["term/similarity"]
    assert (run / "report.png").stat().st_size > 10_000


def test_checkpoint_explains_itself(run):
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)
    config = yaml.safe_load(checkpoint["lssl"]["config"])
    assert config["model"]["class_path"].endswith("LongitudinalLocal")
    assert config == yaml.safe_load((run / "config.yaml").read_text())


@pytest.mark.slow  # also in test_continue.py
def test_a_second_run_takes_another_folder(tmp_path):
    first = fit(tmp_path, "demo.yaml", options=QUIET, backbone=TINY_NET)
    before = (first / "metrics.csv").read_text()
    fit(tmp_path, "demo.yaml", options=QUIET, backbone=TINY_NET)
    assert (first / "metrics.csv").read_text() == before
    assert (tmp_path / "run-2" / "metrics.csv").is_file()


def test_a_resumed_run_continues_exactly_and_loses_nothing(tmp_path):
    """Four steps in one go, or two and two: the same weights."""
    weights = {}
    for name, stages in {"whole": [4], "halves": [2, 4]}.items():
        (tmp_path / name).mkdir()
        for number, stop in enumerate(stages):
            options = [*QUIET, f"--trainer.max_steps={stop}", "--model.init_args.schedule=null"]
            options += ["--ckpt_path=last"] if number else []
            run = fit(tmp_path / name, "demo.yaml", options=options, backbone=TINY_NET)
        checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)
        assert checkpoint["global_step"] == 4
        weights[name] = checkpoint["state_dict"]
    assert (run / "config.1.yaml").is_file()
    assert (run / "metrics.csv").read_text() == (tmp_path / "whole" / "run" / "metrics.csv").read_text()
    assert not list(run.glob("metrics.*.csv"))
    for key, value in weights["whole"].items():
        torch.testing.assert_close(weights["halves"][key], value, rtol=0, atol=0, msg=key)


@pytest.mark.slow  # tests/strategies/test_exact_resume.py: every method, in one process
@pytest.mark.parametrize(
    ("config", "options", "moving"),
    [
        ("global_contrastive.yaml", ["objective=MoCo"], ["teacher.backbone", "teacher.projector", "objective.queue"]),
        ("global_contrastive.yaml", ["objective=BYOL"], ["teacher.backbone", "objective.predictor"]),
        ("prior_guided_local.yaml", ["taps=[encoder.2]", "hidden=16"], ["teacher.backbone", "teacher.projectors"]),
        ("masked_autoencoder.yaml", ["block=8"], ["backbone", "to_image"]),
        (
            "anatomical_invariance.yaml",
            ["hidden=16", "block=8", "objective.init_args.teacher_warmup=1.0"],
            ["teacher.attention", "objective.inter.centre", "objective.intra.centre", "objective.intra.temperature"],
        ),
    ],
)
def test_an_interrupted_run_continues_teacher_queue_and_momentum(config, options, moving, tmp_path):
    """Six steps in one go, or stopped after three and resumed: the same weights, to the bit."""
    options = [f"--model.init_args.{option}" for option in options]
    options += ["--trainer.max_steps=6", "--data.init_args.batch_size=2", "--data.init_args.subjects=10"]
    interrupt = '--trainer.callbacks={"class_path": "helpers.Interrupt", "init_args": {"step": 3}}'
    states = {}
    for name, stages in {"whole": [[]], "halves": [[interrupt], ["--ckpt_path=last"]]}.items():
        (tmp_path / name).mkdir()
        for stage in stages:
            run = fit(tmp_path / name, config, options=[*options, *stage], backbone=TINY_NET)
            checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)
            assert checkpoint["global_step"] == (3 if interrupt in stage else 6)
            states[name, interrupt in stage] = checkpoint["state_dict"]
    whole, half, resumed = states["whole", False], states["halves", True], states["halves", False]
    for part in moving:
        names = [name for name in whole if name.startswith(part) and whole[name].is_floating_point()]
        assert any(not torch.equal(whole[name], half[name]) for name in names), part
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


def test_validate_test_and_predict(run):
    config = ["--config", str(run / "config.yaml"), "--ckpt_path", "best"]
    before = (run / "metrics.csv").read_text()
    main(["validate", *config])
    main(["test", *config])
    assert "test/similarity" in (run / "test" / "metrics.csv").read_text()
    assert "val/similarity" in (run / "validate" / "metrics.csv").read_text()
    assert (run / "metrics.csv").read_text() == before
    main(["predict", *config])
    embeddings = np.load(run / "predict" / "phantom" / "embeddings.npz")
    assert len(embeddings["subject"]) == 8
    assert embeddings["bottleneck"].shape[0] == 8
    assert np.isfinite(embeddings["bottleneck"]).all()
    assert np.abs(embeddings["decoder.0"] - embeddings["decoder.0"][0]).max() > 1e-4
    assert (run / "predict" / "phantom" / "visits.tsv").read_text().startswith("subject\tsession\tage\tyears\tmotion\n")
    main(["trajectories", str(run)])
    assert "bottleneck PC1" in (run / "predict" / "phantom" / "trajectories.tsv").read_text()


@pytest.mark.smoke
@pytest.mark.slow  # docs/test_developer.py resolves a plan of it, test_continue.py runs another
def test_a_users_own_method_is_one_file(tmp_path):
    (tmp_path / "my_methods.py").write_text(VISIT_ORDER)
    (tmp_path / "my.yaml").write_text(
        "model: {class_path: my_methods.VisitOrder, init_args: {tap: bottleneck, loss_weights: {order: 1.0}}}\n"
    )
    small = ["--data.init_args.batch_size=4", "--data.init_args.subjects=8", "--data.init_args.split=[0.75,0.25,0]"]
    result = lssl("fit", "--config", "my.yaml", *tiny(tmp_path), *small, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "train/order" in (tmp_path / "run" / "metrics.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["demo.yaml", "global_contrastive.yaml", "prior_guided_local.yaml"])
def test_two_processes_train_together(config, tmp_path):
    """The report runs on rank zero alone, the monitor on all: nothing may wait for the other process there."""
    options = ["--monitor.every=4"]
    options += ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]
    options += ["--data.init_args.subjects=10", "--data.init_args.batch_size=2"]
    if config != "demo.yaml":
        options += ["--trainer.callbacks=lssl.callbacks.Report"]
    if config == "prior_guided_local.yaml":
        options += ["--model.init_args.taps=[encoder.2]", "--model.init_args.hidden=16"]
    args = ["fit", "--config", str(ROOT / "configs" / config), *tiny(tmp_path, backbone=TINY_NET), *options]
    result = subprocess.run(
        [sys.executable, "-m", "lssl", *args], capture_output=True, text=True, check=False, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "report.json").is_file()
