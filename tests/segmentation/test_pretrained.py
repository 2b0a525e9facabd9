"""Weights out of checkpoints: what is copied, what is counted, what is refused."""

import pytest
import torch
import yaml
from monai.networks.nets import BasicUNet
from safetensors.torch import save_file

from lssl.networks.backbone import Backbone
from lssl.segmentation.pretrained import load_pretrained
from lssl.task import CHECKPOINT_FORMAT
from lssl.utils.errors import InputError

TAPS = {"bottleneck": "down_4.convs.conv_1", "decoder.0": "upcat_1.convs.conv_1"}


def backbone(width=4, out=3, padding="zeros"):
    features = (4, 4, width, 4, 4, 4)
    return Backbone(BasicUNet(3, 1, out, features, norm=("batch", {})), TAPS, padding=padding)


@pytest.fixture
def checkpoint(tmp_path):
    source = backbone()
    for buffer in source.buffers():
        buffer.add_(1)
    state = {f"backbone.{name}": value for name, value in source.state_dict().items()}
    config = {"model": {"class_path": "lssl.strategies.x.Method"}, "backbone": {"padding": "zeros"}, "views": {}}
    path = tmp_path / "last.ckpt"
    torch.save(
        {
            "state_dict": {**state, "head.weight": torch.zeros(1)},
            "lssl": {"format": CHECKPOINT_FORMAT, "config": yaml.safe_dump(config)},
        },
        path,
    )
    return path, source


def test_the_whole_network(checkpoint):
    path, source = checkpoint
    ours = backbone()
    text = load_pretrained(ours, path)
    number, every = len(source.network.state_dict()), sum(p.numel() for p in source.parameters())
    assert f"by Method ({path}): {number} of {number} tensors and {every:,} of {every:,} parameters" in text
    assert "Note" not in text
    for name, value in source.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_the_encoder_alone(checkpoint):
    """With its running statistics; the decoder may differ."""
    path, source = checkpoint
    ours = backbone(out=7)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    text = load_pretrained(ours, path, "encoder")
    moved = 0
    for name, value in ours.state_dict().items():
        inside = name.startswith(("network.conv_0", "network.down_"))
        assert torch.equal(value, source.state_dict()[name] if inside else before[name]), name
        moved += value.numel() if inside and name in dict(ours.named_parameters()) else 0
    assert f"{moved:,} of" in text


def test_another_network_is_refused_unless_parts_are_wanted(checkpoint):
    path, source = checkpoint
    ours = backbone(width=8)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(InputError, match=r"differs from this one in \d+ tensors .down_2.*is 4×4×3×3×3 there and 8×4"):
        load_pretrained(ours, path)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    text = load_pretrained(ours, path, partial=True)
    assert torch.equal(ours.network.conv_0.conv_0.conv.weight, source.network.conv_0.conv_0.conv.weight)
    shapes = {name: value.shape for name, value in source.network.state_dict().items()}
    fits = sum(shapes[name] == value.shape for name, value in ours.network.state_dict().items())
    assert f": {fits} of {len(shapes)} tensors" in text
    with pytest.raises(InputError, match="Nothing in"):
        load_pretrained(Backbone(torch.nn.Conv3d(1, 2, 3, padding=1), {}), path, partial=True)


def test_another_padding_is_said(checkpoint):
    assert "trained with padding 'zeros', this network has 'reflect'" in load_pretrained(
        backbone(padding="reflect"), checkpoint[0]
    )


def test_missing_and_truncated_checkpoints(checkpoint, tmp_path):
    path, _ = checkpoint
    with pytest.raises(InputError, match="There is no checkpoint"):
        load_pretrained(backbone(), tmp_path / "nowhere.ckpt")
    for share in (0, 0.3, 0.9):
        cut = tmp_path / "cut.ckpt"
        cut.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(InputError, match="is not a checkpoint, is truncated"):
            load_pretrained(backbone(), cut)


def test_other_channels_are_adapted_if_asked(checkpoint):
    path, source = checkpoint
    ours = Backbone(BasicUNet(3, 3, 3, (4, 4, 4, 4, 4, 4), norm=("batch", {})), TAPS, in_channels=3)
    with pytest.raises(InputError, match="input_channels to adapt"):
        load_pretrained(ours, path)
    text = load_pretrained(ours, path, adapt_channels=True)
    assert "averaged over channels and repeated (conv_0.conv_0.conv.weight)" in text
    image = torch.randn(2, 1, 16, 16, 16)
    with torch.no_grad():  # three equal channels are one
        there, here = source.eval().network(image), ours.eval().network(image.repeat(1, 3, 1, 1, 1))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nest", [None, "state_dict", "model", "network_weights"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.network.", "encoder."])
def test_plain_weights_whatever_their_prefix(tmp_path, nest, prefix):
    source, ours = backbone().network, backbone(padding="reflect")
    state = {prefix + name: value + 1 for name, value in source.state_dict().items()}
    state["projector.weight"] = torch.zeros(7)
    path = tmp_path / "weights.pt"
    torch.save({nest: state, "epoch": 3} if nest else state, path)
    text = load_pretrained(ours, path)
    number, every = len(source.state_dict()), sum(p.numel() for p in source.parameters())
    assert f"{number} of {number + 1} tensors of the file" in text
    assert f": {number} of {number} tensors and {every:,} of {every:,} parameters" in text
    assert "does not say its padding, this network has 'reflect'" in text
    for name, value in source.state_dict().items():
        assert torch.equal(ours.network.state_dict()[name], value + 1), name


def test_safetensors_of_a_wrapped_network(tmp_path):
    """Our network may be the one with the prefix."""
    source = backbone()
    path = tmp_path / "weights.safetensors"
    save_file({f"net.{name}": value.contiguous() for name, value in source.network.state_dict().items()}, path)
    ours = Backbone(torch.nn.Sequential(backbone().network), {})
    assert "names 'net.*' read as '0.*'" in load_pretrained(ours, path)
    for name, value in source.network.state_dict().items():
        assert torch.equal(ours.network.state_dict()[f"0.{name}"], value), name
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="is truncated"):
        load_pretrained(ours, path)


def test_plain_weights_that_do_not_fit_are_refused(tmp_path):
    """One parameter that is missing is enough, unless parts are wanted; the encoder may come alone."""
    source, ours = backbone(), backbone()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    state = {f"encoder.{name}": value + 1 for name, value in source.network.state_dict().items()}
    path = tmp_path / "encoder.pth"
    torch.save({name: value for name, value in state.items() if "conv_0" in name or "down_" in name}, path)
    with pytest.raises(InputError, match=r"in \d+ tensors .*upcat_4.* is missing there.*its network as backbone"):
        load_pretrained(ours, path)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    load_pretrained(ours, path, part="encoder")
    assert torch.equal(ours.network.conv_0.conv_0.conv.weight, source.network.conv_0.conv_0.conv.weight + 1)
    torch.save({"epoch": 3}, path)
    with pytest.raises(InputError, match="holds no tensors by name"):
        load_pretrained(ours, path)
    torch.save({"other.weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="Nothing in"):
        load_pretrained(ours, path, partial=True)
