"""Weights of other programs: whose names are read how, and what share of them is enough."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import DynUNet, SwinUNETR
from safetensors.torch import save_file

from lssl.export import nnunet
from lssl.networks.backbone import Backbone
from lssl.segmentation.foreign import renamed
from lssl.segmentation.pretrained import load_pretrained
from lssl.utils.errors import InputError

TAPS = {"bottleneck": "bottleneck", "decoder.0": "upsamples.1"}


def dynunet(out=3):
    return DynUNet(3, 1, out, [3] * 3, [1, 2, 2], [2, 2], filters=[4, 6, 8])


def nnunet_file(tmp_path, bias=False, classes=3):
    """What nnU-Net saves: names of PlainConvUNet, twice each, under network_weights."""
    source = dynunet()
    weights = nnunet.weights("monai.networks.nets.DynUNet", source, None)
    if bias:  # nnU-Net's default; instance norm removes it
        weights |= {
            name.replace(".weight", ".bias"): torch.ones(len(value))
            for name, value in weights.items()
            if name.endswith((".conv.weight", ".all_modules.0.weight"))
        }
    for name in [name for name in weights if "seg_layers" in name]:
        weights[name] = torch.zeros(classes, *weights[name].shape[1:])
    torch.save({"network_weights": weights, "trainer_name": "nnUNetTrainer", "init_args": {}}, tmp_path / "nn.pth")
    return source, tmp_path / "nn.pth"


@pytest.mark.parametrize("bias", [False, True])
def test_nnunet_weights_start_a_dynunet(tmp_path, bias):
    source, path = nnunet_file(tmp_path, bias)
    ours = Backbone(dynunet(out=7), TAPS)
    before = ours.network.output_block.conv.conv.weight.clone()
    text = load_pretrained(ours, path)
    assert "nnU-Net's PlainConvUNet read as MONAI's DynUNet" in text
    assert "of the weights of the network; left as they were: output_block.conv.conv.weight is missing there" in text
    for name, value in source.state_dict().items():
        if not name.startswith(("output_block", "skip_layers")):
            assert torch.equal(ours.network.state_dict()[name], value), name
    assert torch.equal(ours.network.output_block.conv.conv.weight, before)


def test_a_dynunets_second_names_count_once(tmp_path):
    """Also without them, as safetensors stores it."""
    source, ours = dynunet(), Backbone(dynunet(), TAPS)
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("skip_layers")}
    save_file(state, tmp_path / "net.safetensors")
    text = load_pretrained(ours, tmp_path / "net.safetensors")
    assert f": {len(state)} of {len(state)} tensors and" in text
    assert "left as they were" not in text
    torch.save(source.state_dict(), tmp_path / "net.pt")
    assert f": {len(state)} of {len(state)} tensors and" in load_pretrained(
        Backbone(dynunet(), TAPS), tmp_path / "net.pt"
    )


def test_swin_unetr_weights_of_monais_pretraining():
    """``module.*`` of the transformer alone, whose blocks say fc1 and fc2; the decoder is not in the file."""
    network = SwinUNETR(in_channels=1, out_channels=2, feature_size=12)
    inner = network.swinViT.state_dict()
    named = {f"module.{name}".replace(".mlp.linear", ".mlp.fc"): value for name, value in inner.items()}
    found, how = renamed({**named, "module.rotation_head.weight": torch.zeros(4, 192)}, network.state_dict())
    assert how == "Swin blocks 'mlp.fc' read as MONAI's 'mlp.linear', names 'module.*' read as 'swinViT.*'"
    assert found.keys() == {f"swinViT.{name}" for name in inner}
    assert all(value is inner[name.removeprefix("swinViT.")] for name, value in found.items())


def test_below_the_bar_a_file_is_refused_and_above_it_named(tmp_path):
    """Of two layers with 27 · 20 and 20 weights; without the small one 96 % match, without the large one 4 %."""

    def network():
        return torch.nn.Sequential(
            torch.nn.Conv3d(1, 20, 3, padding=1, bias=False), torch.nn.Conv3d(20, 1, 1, bias=False)
        )

    state = network().state_dict()
    for kept, share in (("0.weight", 96), ("1.weight", 4)):
        torch.save({kept: state[kept]}, tmp_path / f"{share}.pt")
    ours = Backbone(network(), {"a": "0"})
    text = load_pretrained(ours, tmp_path / "96.pt")
    assert "96% of the weights of the network; left as they were: 1.weight is missing there." in text
    with pytest.raises(InputError, match=r"differs from this one in 1 tensors .* 4% of the weights match"):
        load_pretrained(ours, tmp_path / "4.pt")
    assert "4% of the weights" in load_pretrained(ours, tmp_path / "4.pt", partial=True)


def test_unrelated_names_are_no_dialect():
    theirs = {"encoder.stages.conv.weight": torch.zeros(3), "a": torch.zeros(2)}
    assert renamed(theirs, {"a": torch.zeros(2)}) == ({"a": theirs["a"]}, "")
