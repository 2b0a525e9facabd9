"""Runs of ChangeSegmenter: from fit to predict, from weights of one visit, and what is refused."""

from __future__ import annotations

import json
import re

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from helpers import ROOT, TINY_NET, few, fit, sentence, tiny
from monai.networks.nets import BasicUNet

import lssl
from lssl.cli.main import main
from lssl.runs.outputs import read_scores

# --- the command line -------------------------------------------------------------------------------------------------

PHANTOM = {
    "subjects": 8,
    "visits": 3,
    "size": 32,
    "spacing": 6.0,
    "num_workers": 0,
    "single_visit_fraction": 0.125,
    "split": [0.5, 0.25, 0.25],
    "lesions": 6,
    "labels": "change",
}
DATA = {"class_path": "PhantomDataModule", "init_args": PHANTOM}
SUMS = {
    "network": {"class_path": "monai.networks.nets.SegResNet", "init_args": {"init_filters": 8, "out_channels": 4}},
    "taps": {"bottleneck": "down_layers.3"},
}
SMALL = ["--data.init_args.source_size=null", "--data.init_args.few_shot.steps=2", "--model.init_args.window_overlap=0"]


def test_from_fit_to_predict(tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    classes = "--model.init_args.classes={new: [1], grown: [2]}"
    run = fit(tmp_path, "change_segmenter.yaml", options=[*SMALL, classes], data=DATA, backbone=TINY_NET)
    assert "lssl test --config" in capsys.readouterr().out
    assert "8 labelled visits left out" not in caplog.text  # first visits have no label
    assert "val/dice" in (run / "metrics.csv").read_text()
    later = ["--config", str(run / "config.yaml"), "--ckpt_path", "last"]
    main(["test", *later])
    out = capsys.readouterr().out
    assert "false lesions (pairs without change)" in out
    pairs = pd.read_csv(run / "test/phantom/lesions.tsv", sep="\t")
    assert set(pairs["class"]) == {"new", "grown"}
    assert set(pairs["session"]) == {"visit-00/visit-01", "visit-01/visit-02"}
    assert (pairs["confirmed"] <= pairs["lesions"]).all()
    scores = pd.read_csv(run / "test/phantom/scores.tsv", sep="\t")
    assert len(scores) == 12
    listed = read_scores(run)
    for part, metric in ((pairs["true_lesions"] > 0, "f1"), (pairs["true_lesions"] == 0, "false_lesions")):
        own = listed[listed["metric"] == metric]
        assert own["value"].tolist() == pytest.approx(pairs[part][metric].tolist(), abs=1e-5)
        assert own["session"].tolist() == pairs[part]["session"].tolist()
    pictures = {path.stem for path in (run / "test/phantom/pictures").iterdir()}
    assert pictures == {f"{subject}_visit-0{visit}" for subject in pairs["subject"].unique() for visit in (1, 2)}
    caplog.clear()
    main(["predict", *later])
    assert "8 visits left out, without an earlier visit of known order" in caplog.text
    everyone = pd.read_csv(run / "predict/phantom/lesions.tsv", sep="\t")
    assert len(everyone) == 2 * 7 * 2  # seven subjects of three visits, two classes
    files = sorted((run / "predict/phantom").glob("sub-*/ses-*/anat/*_desc-lsslchange_dseg.nii.gz"))
    assert len(files) == 14
    assert not [path for path in files if "visit00" in path.name]
    written = np.concatenate([np.unique(np.asanyarray(nib.load(path).dataobj)) for path in files])
    assert set(written) <= {0, 1, 2}
    table = (run / "predict/phantom/desc-lsslchange_dseg.tsv").read_text().split("\n")
    assert table[:3] == ["index\tname", "1\tnew", "2\tgrown"]
    loaded = lssl.load(run)
    assert (loaded.combine, loaded.classes.names) == ("subtract", ("new", "grown"))
    assert "whose answer needs two visits" in sentence(capsys, "export", str(run), str(tmp_path / "out"))


def from_one_visit(tmp_path):
    """Arguments that start from a network of one visit."""
    (tmp_path / "before").mkdir()
    plain = {"class_path": "PhantomDataModule", "init_args": {**PHANTOM, "labels": "anatomy"}}
    off = "--trainer.callbacks=null"
    before = fit(tmp_path / "before", "masked_autoencoder.yaml", options=[SMALL[0], off], data=plain, backbone=TINY_NET)
    args = ["fit", "--config", str(ROOT / "configs/change_segmenter.yaml"), *tiny(tmp_path, data=DATA), *SMALL]
    return [*args, f"--model.init_args.pretrained={before / 'checkpoints/last.ckpt'}", "--trainer.max_steps=1"]


@pytest.mark.slow
def test_pretrained_weights_of_one_visit_see_both_as_channels(tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    args = [*from_one_visit(tmp_path), "--model.init_args.combine=concatenate"]
    assert "input_channels to adapt" in sentence(capsys, *args)
    narrow = [f"--backbone={json.dumps(TINY_NET)}"]
    said = sentence(capsys, *args, *narrow)
    assert "concatenate shows the network both visits as channels, two times 1" in said
    main([*args, "--model.init_args.input_channels=adapt"])
    assert "padding and, for two visits, twice its channels are its own" in caplog.text
    assert "The first convolution was averaged over channels and repeated" in caplog.text


@pytest.mark.slow
def test_pretrained_weights_of_one_visit_are_weighted_from_fit_to_predict(tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    main([*from_one_visit(tmp_path), "--model.init_args.combine=weight"])
    tensors = len(BasicUNet(3, 1, 4, (4,) * 6, norm="batch").state_dict())
    assert f"{tensors} of {tensors} tensors" in caplog.text
    later = ["--config", str(tmp_path / "run/config.yaml"), "--ckpt_path", "last"]
    main(["test", *later])
    main(["predict", *later])
    assert len(list((tmp_path / "run/predict/phantom").glob("sub-*/ses-*/anat/*.nii.gz"))) == 14
    assert "trained with combine: weight" in sentence(capsys, "test", *later, "--model.init_args.combine=subtract")


@pytest.mark.parametrize(
    ("options", "says"),
    few(
        [
            (["--views.geometry=shared"], "set views.geometry to aligned"),
            (["--views.same_visit=0.5"], "views.same_visit to 0"),
            (["--model.init_args.combine=add"], "subtract"),
            (["--model.init_args.combine=weight", f"--backbone={json.dumps(SUMS)}"], "modules of SegResNet get them"),
            (["--model.init_args.min_overlap=0"], "min_overlap a share above 0"),
            (["--model.init_args.loss_weights={consistency: 1}"], "has no term 'consistency'"),
            (["--model.init_args.targets=soft"], "ChangeSegmenter has no option 'targets'"),
            (["--data.init_args.visits=1"], "no labelled visit to train on"),
            (["--data.init_args.lesions=0"], "no change"),
        ],
        5,
    ),
)
def test_mistakes_are_one_sentence(options, says, tmp_path, capsys):
    args = ["--config", str(ROOT / "configs/change_segmenter.yaml"), *tiny(tmp_path, data=DATA, backbone=TINY_NET)]
    assert re.search(says, sentence(capsys, "fit", *args, *SMALL, *options))
