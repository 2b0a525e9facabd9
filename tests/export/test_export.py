"""Weights for programs that do not know lssl: rebuilt there, they answer as here."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from helpers import TINY_NET, few, fit, sentence
from safetensors.torch import load_file
from test_readme import DOCS, blocks

from lssl.checkpoint import load_task
from lssl.cli.main import main
from lssl.data.description import describe
from lssl.export import command
from lssl.export.command import export_network
from lssl.utils.errors import InputError

CLASSES = {"cortex": [3, 42], "white matter": [2, 41]}
TAPS = {"bottleneck": "down_4.convs.conv_1", "decoder.0": "upcat_1.convs.conv_1"}
SEGMENTER = {"class_path": "lssl.Segmenter", "init_args": {"classes": CLASSES, "window_overlap": 0.0}}
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs lssl[onnx]",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A Segmenter with reflect padding, which a state_dict does not hold."""
    folder = tmp_path_factory.mktemp("export")
    backbone = {**TINY_NET, "taps": TAPS, "padding": "reflect"}
    return fit(folder, model=SEGMENTER, backbone=backbone, options=["--data.init_args.few_shot.steps=2"])


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory):
    """Channels innermost in memory, which safetensors refuses."""
    return fit(
        tmp_path_factory.mktemp("pretraining"),
        model={"class_path": "PriorGuidedLocal", "init_args": {"taps": ["bottleneck"], "min_points": 1}},
        backbone={**TINY_NET, "taps": TAPS, "channels_last": True},
    )


def test_a_segmenter_answers_without_lssl_as_with_it(run, tmp_path, capsys):
    out = tmp_path / "out"
    main(["export", str(run), "--to", "monai", str(out)])
    assert "Rebuilt without lssl, its answers differ by" in capsys.readouterr().out
    meta = json.loads((out / "metadata.json").read_text())
    assert (meta["network"]["class"], meta["padding"], meta["classes"]) == (
        "monai.networks.nets.BasicUNet",
        "reflect",
        CLASSES,
    )
    assert meta["spacing_mm"] == [5.0, 5.0, 5.0]
    assert meta["taps"]["bottleneck"] == {
        "path": TAPS["bottleneck"],
        "channels": 4,
        "stride": [16] * 3,
        "offset": [7.5] * 3,
    }
    assert (meta["data"]["training_subjects"], meta["data"]["training_visits"]) == (2, 4)
    sample = torch.load(out / "sample.pt", weights_only=True)
    assert sample["answers"]["output"].shape == (1, 3, 32, 32, 32)
    rebuilt = runpy.run_path(str(out / "rebuild.py"))
    other = torch.rand(1, 1, 48, 32, 32, generator=torch.Generator().manual_seed(1))
    ours = load_task(run / "checkpoints/best.ckpt")
    with torch.no_grad():
        features = rebuilt["features"](rebuilt["load"](), other)
        torch.testing.assert_close(features["output"], ours.logits(other))
        torch.testing.assert_close(features["decoder.0"], ours.backbone(other, ["decoder.0"])["decoder.0"])
    assert "is not empty" in sentence(capsys, "export", str(run), str(out))


@pytest.mark.slow
def test_the_ten_lines_of_the_page_load_it_into_monai(tmp_path, monkeypatch):
    """Padding is reflect, which a state_dict does not hold."""
    model = {"class_path": "PriorGuidedLocal", "init_args": {"taps": ["bottleneck"], "min_points": 1}}
    made = fit(tmp_path, model=model, backbone={**TINY_NET, "taps": TAPS, "padding": "reflect"})
    main(["export", str(made), str(tmp_path / "exported")])
    monkeypatch.chdir(tmp_path)
    page = next(page for page in DOCS if page.name == "weights.md")
    (text,) = [text for text in blocks(page, "python") if "monai" in text]
    assert len(list(filter(None, text.splitlines()))) <= 10
    exec(text, {})
    with pytest.raises(AssertionError, match="not close"):
        exec(text.replace('meta["padding"]', '"zeros"'), {})


def test_the_model_card_is_what_hugging_face_reads(pretraining, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_verified", lambda folder, python: 0.0)
    out = tmp_path / "out"
    export_network(pretraining / "checkpoints/last.ckpt", out, "safetensors", license="cc-by-4.0")
    assert (
        load_file(out / "model.safetensors").keys()
        == load_task(pretraining / "checkpoints/last.ckpt").backbone.network.state_dict().keys()
    )
    _, front, text = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    meta = yaml.safe_load(front)
    assert (meta["license"], meta["pipeline_tag"], meta["library_name"]) == (
        "cc-by-4.0",
        "image-feature-extraction",
        "pytorch",
    )
    assert "The padding of the\nconvolutions is `zeros`" in text
    assert "4 visits of 2 subjects (PhantomDataModule)" in text
    assert not re.findall(r"\{\w*\}", text)


def test_a_network_that_answers_differently_is_refused(run, tmp_path, monkeypatch):
    """As a plain MONAI network does, which loads the weights strictly and pads with zeros."""
    from lssl.export import targets

    (tmp_path / "programs").mkdir()
    text = (targets.HERE / "rebuild.py").read_text()
    assert 'meta["padding"]' in text
    (tmp_path / "programs/rebuild.py").write_text(text.replace('meta["padding"]', '"zeros"'))
    monkeypatch.setattr(targets, "HERE", tmp_path / "programs")
    with pytest.raises(InputError, match="Nothing was written: the network rebuilt without lssl answers differently"):
        export_network(run / "checkpoints/last.ckpt", tmp_path / "out", "safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["programs"]


def test_the_verification_cannot_use_lssl(run, tmp_path, monkeypatch):
    from lssl.export import targets

    (tmp_path / "programs").mkdir()
    (tmp_path / "programs/rebuild.py").write_text("import lssl\nprint(0.0)\n")
    monkeypatch.setattr(targets, "HERE", tmp_path / "programs")
    with pytest.raises(InputError, match=r"could not rebuild the network without lssl: .*lssl"):
        export_network(run / "checkpoints/last.ckpt", tmp_path / "out")


def test_what_cannot_be_exported_is_said(run, capsys, tmp_path):
    out = str(tmp_path / "out")
    assert "neither a checkpoint nor a run folder" in sentence(capsys, "export", str(tmp_path), out)
    assert "no option --imagg; did you mean '--image'" in sentence(capsys, "export", "a", "b", "--imagg", "x")
    assert "BasicUNet is no network of nnU-Net" in sentence(capsys, "export", str(run), out, "--to", "nnunet")
    assert "cannot be run" in sentence(capsys, "export", str(run), out, "--python", str(tmp_path / "none"))
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    said = sentence(capsys, "export", str(run), str(tmp_path / "out"), "--to", "onnx")
    assert said == "--to onnx needs onnx, onnxscript, onnxruntime: pip install 'lssl[onnx]'."


@needs_onnx
@pytest.mark.parametrize("padding", few(["run", "pretraining"], 1))
def test_onnx_runtime_answers_as_torch_for_other_sizes_too(request, padding, tmp_path):
    run = request.getfixturevalue(padding)
    assert export_network(run / "checkpoints/last.ckpt", tmp_path / "out", "onnx") < command.TOLERANCE
    session = runpy.run_path(str(tmp_path / "out/rebuild.py"))["load"]()
    task = load_task(run / "checkpoints/last.ckpt")
    image = torch.rand(2, 1, 48, 32, 64, generator=torch.Generator().manual_seed(1))
    found = dict(
        zip([one.name for one in session.get_outputs()], session.run(None, {"image": image.numpy()}), strict=True)
    )
    with torch.no_grad():
        features = task.backbone(image, ["decoder.0"], output=True)
        output = task.logits(image) if padding == "run" else features["output"]
    for name, value in {"output": output, "decoder.0": features["decoder.0"]}.items():
        torch.testing.assert_close(torch.from_numpy(found[name]), value, rtol=1e-3, atol=1e-4)


def test_a_description_of_data_names_nobody(bids):
    from lssl.datamodules.nifti import NiftiDataModule

    data = NiftiDataModule(bids)
    data.setup()
    found = describe(data)
    assert (found["class"], found["channels"], found["spacing_mm"]) == ("NiftiDataModule", ["T1w"], [4.0, 4.0, 4.0])
    assert found["training_visits"] == 2 * found["training_subjects"] > 0
    text = json.dumps(found)
    assert not any(name in text for name in [*data.subjects, *data.table["session"], str(bids)])
    assert describe(None) == {}
    assert describe(object()) == {"class": "object"}


def test_the_crop_may_come_from_an_image(tmp_path):
    image = np.random.default_rng(0).random((40, 36, 34), dtype=np.float32)
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "scan.nii.gz")
    crop = command._crop((32, 32, 32), 2, tmp_path / "scan.nii.gz")
    assert crop.shape == (1, 2, 32, 32, 32)
    assert np.corrcoef(crop[0, 1].numpy().ravel(), image[4:36, 2:34, 1:33].ravel())[0, 1] > 0.999
    with pytest.raises(InputError, match="smaller than the network's views"):
        command._crop((48, 32, 32), 1, tmp_path / "scan.nii.gz")


@pytest.mark.slow
def test_a_network_of_ones_own_is_rebuilt_from_its_module(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_nets.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Sequential):\n"
        "    def __init__(self, width: int):\n"
        "        super().__init__(torch.nn.Conv3d(1, width, 3, padding=1), torch.nn.Conv3d(width, 4, 3, padding=1))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    network = {
        "network": {"class_path": "my_nets.Net", "init_args": {"width": 5}},
        "taps": {"a": "0"},
        "padding": "reflect",
    }
    run = fit(tmp_path, model=SEGMENTER, backbone=network, options=["--data.init_args.few_shot.steps=2"])
    assert "is no network of MONAI" in sentence(capsys, "export", str(run), "out")
    main(["export", str(run), "out", "--to", "safetensors"])
    assert "answers differ by 0.0e+00" in capsys.readouterr().out
    sys.modules.pop("my_nets", None)


@pytest.mark.parametrize("headed", [False, True])
def test_of_several_outputs_the_finest_is_exported_and_rebuilt(headed, tmp_path, monkeypatch):
    """As of nnU-Net's networks with deep supervision, which ended in a traceback."""
    from lssl.export import targets

    (tmp_path / "deep_nets.py").write_text(
        "import torch\n\n\nclass Deep(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.fine, self.coarse = torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.Conv3d(4, 4, 2, 2)\n\n"
        "    def forward(self, image):\n        return [self.fine(image), self.coarse(self.fine(image))]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    network = importlib.import_module("deep_nets").Deep()
    head = torch.nn.Conv3d(4, 3, 1) if headed else None
    crop = torch.rand(1, 1, 8, 8, 8)
    given = targets.answers(targets.Network(network, head, {"fine": "fine"}, {}, crop))
    with torch.no_grad():
        wanted = network.fine(crop) if head is None else head(network.fine(crop))
    assert torch.equal(given["output"], wanted)
    meta = {
        "network": {"class": "deep_nets.Deep", "arguments": {}},
        "padding": "zeros",
        "classes": CLASSES if headed else {},
        "head": [4, 3],
        "taps": {"fine": {"path": "fine"}},
    }
    (tmp_path / "metadata.json").write_text(json.dumps(meta))
    (tmp_path / "rebuild.py").write_text((targets.HERE / "rebuild.py").read_text())
    torch.save(network.state_dict(), tmp_path / "model.pt")
    if head is not None:
        torch.save(head.state_dict(), tmp_path / "head.pt")
    torch.save({"image": crop, "answers": given}, tmp_path / "sample.pt")
    assert runpy.run_path(str(tmp_path / "rebuild.py"))["compare"]() == 0
    sys.modules.pop("deep_nets", None)
