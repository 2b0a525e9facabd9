"""nnU-Net's names and plans, against its network written down anew, and against nnU-Net where it is installed."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
import torch.nn.functional as F
from helpers import fit
from monai.networks.nets import DynUNet
from test_readme import DOCS, blocks

from lssl.checkpoint import load_task
from lssl.export import nnunet
from lssl.export.command import export_network
from lssl.utils.errors import InputError

LINES = next(
    text for page in DOCS if page.name == "weights.md" for text in blocks(page, "python") if "nnunetv2" in text
)
PYTHON = os.environ.get("LSSL_NNUNET_PYTHON", "")
KIND = "monai.networks.nets.DynUNet"
ARGUMENTS = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 4,
    "kernel_size": [3, 3, 3],
    "strides": [1, 2, [2, 2, 1]],
    "upsample_kernel_size": [2, [2, 2, 1]],
    "filters": [4, 6, 8],
}
NET = {
    "network": {"class_path": KIND, "init_args": ARGUMENTS},
    "taps": {"bottleneck": "bottleneck", "decoder.0": "upsamples.1"},
}


def plain_conv_unet(weights, options, image):
    """PlainConvUNet's output from its tensors, by the description in nnU-Net's paper and code.

    Stages of (convolution, instance norm, leaky ReLU) twice, the first convolution strided; transposed convolutions up,
    concatenated before the skip.
    """

    def block(x, name, stride=1):
        for number in range(2):
            kernel, scale, shift = (
                weights[f"{name}.convs.{number}.{leaf}"] for leaf in ("conv.weight", "norm.weight", "norm.bias")
            )
            x = F.conv3d(x, kernel, stride=stride if number == 0 else 1, padding=1)
            x = F.leaky_relu(F.instance_norm(x, weight=scale, bias=shift, eps=1e-5), 0.01)
        return x

    skips = []
    for stage, stride in enumerate(options["strides"]):
        image = block(image, f"encoder.stages.{stage}.0", stride)
        skips.append(image)
    x = skips.pop()
    for stage, stride in enumerate(reversed(options["strides"][1:])):
        x = F.conv_transpose3d(x, weights[f"decoder.transpconvs.{stage}.weight"], stride=stride)
        x = block(torch.cat([x, skips.pop()], 1), f"decoder.stages.{stage}")
    last = f"decoder.seg_layers.{len(options['strides']) - 2}"
    return F.conv3d(x, weights[f"{last}.weight"], weights[f"{last}.bias"])


@pytest.mark.parametrize("headed", [False, True])
@torch.no_grad()
def test_dynunet_is_plain_conv_unet(headed):
    network = DynUNet(**ARGUMENTS).eval()
    for parameter in network.parameters():  # norms other than 1 and 0
        parameter.add_(0.1 * torch.randn_like(parameter))
    head = torch.nn.Conv3d(4, 3, 1) if headed else None
    built = nnunet.architecture(KIND, ARGUMENTS, network)
    assert built["arch_kwargs"]["features_per_stage"] == [4, 6, 8]
    image = torch.rand(2, 1, 16, 8, 12)
    ours = network(image) if head is None else head(network(image))
    theirs = plain_conv_unet(nnunet.weights(KIND, network, head), built["arch_kwargs"], image)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_every_tensor_has_both_of_its_names():
    weights = nnunet.weights(KIND, DynUNet(**ARGUMENTS), None)
    for name, value in weights.items():
        if ".all_modules.0." in name:
            assert torch.equal(value, weights[name.replace("all_modules.0", "conv")])
        if ".all_modules.1." in name:
            assert torch.equal(value, weights[name.replace("all_modules.1", "norm")])
        if name.startswith("encoder."):
            assert torch.equal(value, weights[f"decoder.{name}"])
    assert sum(".all_modules." in name for name in weights) == sum(".conv." in n or ".norm." in n for n in weights)
    assert weights["decoder.seg_layers.0.weight"].shape == (4, 6, 1, 1, 1)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"res_block": True}, "res_block"),
        ({"strides": [2, 2, 2], "upsample_kernel_size": [2, 2]}, "strides"),
        ({"norm_name": ("group", {"num_groups": 2})}, "GroupNorm with LeakyReLU"),
        ({"trans_bias": True}, "trans_bias"),
    ],
)
def test_what_has_no_counterpart_is_refused(changed, named):
    arguments = ARGUMENTS | changed
    with pytest.raises(InputError, match=named):
        nnunet.architecture(KIND, arguments, DynUNet(**arguments))


def test_plans_name_axes_spacing_and_patch():
    plans = nnunet.plans({}, 2, [1.0, 1.5, 2.0], [96, 64, 32])
    assert plans["image_reader_writer"] == "NibabelIOWithReorient"
    assert plans["transpose_forward"] == [2, 1, 0]
    configuration = plans["configurations"]["3d_fullres"]
    assert (configuration["spacing"], configuration["patch_size"]) == ([1.0, 1.5, 2.0], [96, 64, 32])
    assert len(configuration["normalization_schemes"]) == 2
    assert nnunet.dataset_json(["T1w"], ["a", "b"])["labels"] == {"background": 0, "a": 1, "b": 2}


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    classes = {"cortex": [3, 42], "white matter": [2, 41]}
    model = {"class_path": "lssl.Segmenter", "init_args": {"classes": classes, "window_overlap": 0.0}}
    options = ["--data.init_args.few_shot.steps=2"]
    return fit(tmp_path_factory.mktemp("nnunet"), model=model, backbone=NET, options=options)


def test_padding_that_nnunet_lacks_is_refused_before_anything_is_written(segmenter, tmp_path, monkeypatch):
    task = load_task(segmenter / "checkpoints/last.ckpt")
    task.backbone.padding = "reflect"
    monkeypatch.setattr("lssl.checkpoint.load_task", lambda path: task)
    with pytest.raises(InputError, match="trained with 'reflect' and nnU-Net pads with zeros"):
        export_network(segmenter / "checkpoints/last.ckpt", tmp_path / "out", "nnunet")
    assert not list(tmp_path.iterdir())


THEIRS = """
import json, sys
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

out = Path(sys.argv[1])
sample = torch.load(out / "sample.pt", weights_only=True)
device = torch.device("cpu")
predictor = nnUNetPredictor(device=device, perform_everything_on_device=False)
predictor.initialize_from_trained_model_folder(str(out), ("all",))
plans = PlansManager(str(out / "plans.json"))
trained = nnUNetTrainer.build_network_architecture(plans, plans.get_configuration("3d_fullres"), 1, 3, True)
load_pretrained_weights(trained, str(out / "fold_all/checkpoint_final.pth"))
largest = sample["answers"]["output"].abs().max()
with torch.no_grad():
    difference = (predictor.network.eval()(sample["image"]) - sample["answers"]["output"]).abs().max() / largest
    one, other = (net.eval()(sample["image"]) for net in (trained.encoder, predictor.network.encoder))
reader = plans.image_reader_writer_class.__name__
print(json.dumps([float(difference), max(float((a - b).abs().max()) for a, b in zip(one, other)), reader]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="needs LSSL_NNUNET_PYTHON, the Python of an environment with nnunetv2")
def test_nnunets_own_loaders_take_it(segmenter, tmp_path):
    assert export_network(segmenter / "checkpoints/last.ckpt", tmp_path / "out", "nnunet", python=PYTHON) < 1e-5
    done = subprocess.run([PYTHON, "-c", THEIRS, str(tmp_path / "out")], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    difference, encoder, reader = json.loads(done.stdout.strip().splitlines()[-1])
    assert difference < 1e-5
    assert encoder == 0
    assert reader == "NibabelIOWithReorient"


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="needs LSSL_NNUNET_PYTHON, the Python of an environment with nnunetv2")
def test_the_lines_of_the_page_load_it_into_nnunet(segmenter, tmp_path):
    export_network(segmenter / "checkpoints/last.ckpt", tmp_path / "exported", "nnunet", python=PYTHON)
    done = subprocess.run([PYTHON, "-c", LINES], cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_nnunet_takes_at_most_ten_lines():
    assert len(list(filter(None, LINES.splitlines()))) <= 10
