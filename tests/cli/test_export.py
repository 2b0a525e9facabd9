"""Weights for programs that do not know lssl: rebuilt there, they answer as here."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import TINY_NET, fit, sentence

from lssl.cli import export
from lssl.cli.export import export_network
from lssl.cli.main import main
from lssl.utils.errors import InputError

CLASSES = {"cortex": [3, 42], "white matter": [2, 41]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A Segmenter with reflect padding, which a state_dict does not hold."""
    folder = tmp_path_factory.mktemp("export")
    model = {"class_path": "lssl.Segmenter", "init_args": {"classes": CLASSES, "window_overlap": 0.0}}
    taps = {"bottleneck": "down_4.convs.conv_1", "decoder.0": "upcat_1.convs.conv_1"}
    backbone = {**TINY_NET, "taps": taps, "padding": "reflect"}
    return fit(folder, model=model, backbone=backbone, options=["--data.init_args.few_shot.steps=2"])


def test_a_segmenter_answers_without_lssl_as_with_it(run, tmp_path, capsys):
    main(["export", str(run), str(tmp_path / "out")])
    assert "rebuilt without lssl, its output differs by" in capsys.readouterr().out
    meta = json.loads((tmp_path / "out/metadata.json").read_text())
    assert (meta["network"]["class"], meta["padding"], meta["classes"]) == ("BasicUNet", "reflect", CLASSES)
    assert meta["spacing_mm"] == [5.0, 5.0, 5.0]
    assert meta["taps"]["bottleneck"] == {"path": "down_4.convs.conv_1", "stride": [16, 16, 16]}
    assert "`reflect`" in (tmp_path / "out/README.md").read_text()
    assert torch.load(tmp_path / "out/sample.pt", weights_only=True)["output"].shape == (1, 3, 32, 32, 32)
    assert "is not empty" in sentence(capsys, "export", str(run), str(tmp_path / "out"))


def test_a_network_that_answers_differently_is_refused(run, tmp_path, monkeypatch):
    """As a plain MONAI network does, which loads the weights strictly and pads with zeros."""
    monkeypatch.setattr(export, "REBUILD", export.REBUILD.replace('meta["padding"] if padded', '"zeros" if padded'))
    with pytest.raises(InputError, match="answers differently"):
        export_network(run / "checkpoints/last.ckpt", tmp_path / "out")


def test_what_cannot_be_exported_is_said(capsys, tmp_path):
    said = sentence(capsys, "export", str(tmp_path), str(tmp_path / "out"))
    assert "neither a checkpoint nor a run folder" in said
    assert "no option --imagg; did you mean '--image'" in sentence(capsys, "export", "a", "b", "--imagg", "x")
