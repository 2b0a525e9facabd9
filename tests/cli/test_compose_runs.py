"""Whole runs from composed configs: a network from its checkpoint, secrets, prediction on other data."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from composing import parsed, write
from helpers import TINY_NET, fit, sentence, tiny

from lssl.cli.complete import complete
from lssl.cli.main import main

# --- secrets ----------------------------------------------------------------------------------------------------------


def test_a_secret_reaches_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LSSL_TEST_SECRET", "hunter2-hunter2")
    own = write(
        tmp_path / "own.yaml",
        "trainer: {logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: runs, name: '', "
        "version: '', prefix: '${oc.env:LSSL_TEST_SECRET}'}}}\n",
    )
    run = fit(tmp_path, "demo.yaml", own, options=["--trainer.callbacks=null"], backbone=TINY_NET)
    assert "hunter2" in (run / "metrics.csv").read_text()  # it was used
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["trainer"]["logger"]["init_args"]["prefix"] == "${oc.env:LSSL_TEST_SECRET}"
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)
    log = checkpoint.pop("exact_resume")  # holds the text of metrics.csv, whose columns have the prefix
    assert "hunter2" in repr(log)
    assert "hunter2" not in repr(checkpoint)
    for path in run.rglob("*"):
        if path.is_file() and path.name != "metrics.csv" and path.suffix != ".ckpt":
            assert b"hunter2" not in path.read_bytes(), path
    monkeypatch.setenv("LSSL_TEST_SECRET", "other")
    assert complete([str(run / "config.yaml")]).values["trainer"]["logger"]["init_args"]["prefix"].startswith("${")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_network_comes_with_its_checkpoint(tmp_path, capsys):
    run = fit(tmp_path, "demo.yaml", options=["--trainer.callbacks=null", "--trainer.max_steps=1"])
    path = str(run / "checkpoints" / "last.ckpt")
    start = ["--config", "finetune", "--model.init_args.pretrained", path, "--data", "PhantomDataModule"]
    config, demo = parsed(capsys, *start), parsed(capsys, "--config", "demo")
    assert config["backbone"] == demo["backbone"]  # network, taps, padding, channels
    assert config["views"]["size"] == 32
    assert config["views"]["spacing"] == [5.0, 5.0, 5.0]
    assert config["data"]["init_args"]["source_size"] == 48
    assert (config["data"]["init_args"]["few_shot"]["subjects"], config["data"]["init_args"]["few_shot"]["visits"]) == (
        None,
        None,
    )
    assert parsed(capsys, *start, "--backbone.padding", "zeros")["backbone"] == {**demo["backbone"], "padding": "zeros"}
    own = parsed(capsys, *start, "--config", "network/segresnet")["backbone"]
    assert own["network"]["class_path"].endswith("SegResNet")
    assert own["padding"] == "zeros"  # a network that is named is taken as it is named
    last = ["--data.init_args.split=[0.5,0.25,0.25]", "--trainer.max_steps=1", "--data.init_args.num_workers=0"]
    last += ["--data.init_args.subjects=4", "--data.init_args.size=40", "--data.init_args.spacing=5"]
    main(["fit", *start, *last, f"--trainer.default_root_dir={tmp_path / 'tuned'}", "--trainer.accelerator=cpu"])
    assert (tmp_path / "tuned" / "checkpoints" / "last.ckpt").is_file()
    assert (tmp_path / "tuned" / "checkpoints" / "best.ckpt").is_file()  # a run shorter than an epoch is validated, too
    words = sentence(capsys, "fit", *start, "--config", str(run / "config.yaml"))
    assert "replaces the model Segmenter of an earlier --config by LongitudinalLocal" in words
    assert "give one of the two; to fine-tune a run's network, give --config finetune" in words
    words = sentence(capsys, "fit", "--config", str(run / "config.yaml"), "--model.init_args.pretrained", path)
    assert "LongitudinalLocal pretrains and has no option 'pretrained', which the Segmenter has" in words
    words = sentence(capsys, "fit", "--config", str(run / "config.yaml"), "--model.init_args.target=diagnosis")
    assert "which the Classifier has; to fine-tune, give --config classifier instead" in words
    words = sentence(
        capsys, "fit", "--config", str(run / "config.yaml"), "--config=regressor", "--data.init_args.targets={a: b}"
    )
    assert "give one of the two; to fine-tune a run's network, give --config regressor" in words
    start[3] = str(run)
    assert f"there is no checkpoint {run}; give {run / 'checkpoints' / 'best.ckpt'}" in sentence(capsys, "fit", *start)


# --- predicting -------------------------------------------------------------------------------------------------------


def test_prediction_needs_no_labels(tmp_path, bids):
    """A folder without labels, to which the pattern of the training's labels does not apply."""
    for image in bids.rglob("*_T1w.nii.gz"):
        of = nib.load(image)
        label = (np.asarray(of.dataobj) > 50).astype(np.int16)
        nib.save(nib.Nifti1Image(label, of.affine), image.with_name(image.name.replace("T1w", "dseg")))
    labelled = [
        "--data.init_args.labels={subject}/{session}/anat/*_dseg.nii.gz",
        "--data.init_args.split=[0.6,0.2,0.2]",
    ]
    small = ["--trainer.max_steps=1", "--data.init_args.few_shot.steps=1", "--data.init_args.num_workers=0"]
    group = tiny(tmp_path, backbone=TINY_NET)
    content = yaml.safe_load(Path(group[1]).read_text())
    content.pop("data")
    Path(group[1]).write_text(yaml.safe_dump(content))
    main(["fit", "--config", "finetune", *group, "--data", str(bids), *labelled, *small])
    run = tmp_path / "run"
    other = tmp_path / "other" / "sub-09" / "ses-1" / "anat"
    other.mkdir(parents=True)
    os.link(next(bids.rglob("*_T1w.nii.gz")), other / "sub-09_ses-1_T1w.nii.gz")
    config = ["--config", str(run / "config.yaml"), "--ckpt_path", "last"]
    main(["predict", *config, "--data", str(tmp_path / "other")])
    volumes = pd.read_csv(next(run.rglob("volumes.csv")))
    assert set(volumes["subject"]) == {"sub-09"}


@pytest.mark.slow
def test_two_contrasts_are_learned_and_predicted_on_the_grid_of_the_first(tmp_path, bids, capsys):
    """The FLAIR has voxels of twice the size and its own origin; a visit without it is left out and named."""
    for image in bids.rglob("*_T1w.nii.gz"):
        of = nib.load(image)
        label = (np.asarray(of.dataobj) > 50).astype(np.int16)
        nib.save(nib.Nifti1Image(label, of.affine), image.with_name(image.name.replace("T1w", "dseg")))
        coarse = nib.Nifti1Image(np.asarray(of.dataobj)[::2, ::2, ::2], of.affine @ np.diag([2.0, 2.0, 2.0, 1.0]))
        nib.save(coarse, image.with_name(image.name.replace("T1w", "FLAIR")))
    (bids / "sub-05/ses-M012/anat/sub-05_ses-M012_FLAIR.nii.gz").unlink()
    net = {**TINY_NET, "network": {**TINY_NET["network"], "init_args": {**TINY_NET["network"]["init_args"]}}}
    net["network"]["init_args"]["in_channels"] = net["in_channels"] = 2
    group = tiny(tmp_path, backbone=net)
    content = yaml.safe_load(Path(group[1]).read_text())
    content.pop("data")
    Path(group[1]).write_text(yaml.safe_dump(content))
    suffixes = "--data.init_args.suffix=[T1w,FLAIR]"
    data = ["--data", str(bids), suffixes, "--data.init_args.labels={subject}/{session}/anat/*_dseg.nii.gz"]
    small = ["--trainer.max_steps=1", "--data.init_args.few_shot.steps=1", "--data.init_args.num_workers=0"]
    main(["fit", "--config", "finetune", *group, *data, "--data.init_args.split=[0.6,0.2,0.2]", *small])
    run = tmp_path / "run"
    config = ["--config", str(run / "config.yaml"), "--ckpt_path", "last"]
    main(["predict", *config, "--data", str(bids), suffixes])
    written = sorted(run.rglob("*_dseg.nii.gz"))
    assert len(written) == 9
    first = nib.load(written[0])
    source = nib.load(bids / "sub-01/ses-M000/anat/sub-01_ses-M000_T1w.nii.gz")
    assert first.shape == source.shape
    np.testing.assert_array_equal(first.affine, source.affine)
    with pytest.raises(SystemExit):
        main(["predict", *config, "--data", str(bids), "--data.init_args.suffix=T1w"])
    assert "The data have 1 channel (T1w) and the network takes 2" in capsys.readouterr().err
