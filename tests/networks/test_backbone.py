"""Backbones: what is measured on MONAI's networks, how little is run, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.networks.backbone import Backbone, unet, unet_taps
from lssl.utils.errors import InputError

NARROW = (4, 4, 8, 8, 8, 4)


def narrow(norm: str = "batch", **options) -> Backbone:
    torch.manual_seed(0)
    return Backbone(unet(features=NARROW, norm=norm), unet_taps(), **options)


def monai(name: str, **options) -> nn.Module:
    from monai.networks import nets

    torch.manual_seed(0)
    return getattr(nets, name)(**options)


def dynunet(kernels: list, strides: list, **options) -> nn.Module:
    return monai(
        "DynUNet",
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        kernel_size=kernels,
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=[8, 16, 16, 16][: len(kernels)],
        **options,
    )


# --- places -----------------------------------------------------------------------------------------------------------


def test_default_unet_taps_lie_where_pooling_by_two_puts_them():
    taps = narrow().taps
    levels = {name: int(name.split(".")[1]) if "." in name else 4 for name in taps}
    assert set(levels) == set(unet_taps())
    for name, level in levels.items():
        assert taps[name].stride == (2**level,) * 3
        assert taps[name].offset == ((2**level - 1) / 2,) * 3
    with torch.no_grad():
        features = narrow()(torch.rand(2, 1, 32, 48, 32), list(taps), output=True)
    for name, tap in taps.items():
        assert features[name].shape == (
            2,
            tap.channels,
            *(n // s for n, s in zip((32, 48, 32), tap.stride, strict=True)),
        )
    assert features["output"].shape == (2, 32, 32, 48, 32)


def test_default_unet_has_the_published_widths():
    channels = {name: tap.channels for name, tap in Backbone().taps.items()}
    assert channels == {
        "encoder.0": 16,
        "encoder.1": 32,
        "encoder.2": 64,
        "encoder.3": 128,
        "skip.3": 128,
        "bottleneck": 256,
        "decoder.3": 128,
        "decoder.2": 64,
        "decoder.1": 32,
        "decoder.0": 16,
    }


SLOW = pytest.mark.slow
CUBE = [3, 3, 3, 3], [1, 2, 2, 2]
FLAT = [[1, 3, 3], 3, 3], [1, [1, 2, 2], [2, 2, 2]]


@pytest.mark.parametrize(
    ("network", "path", "channels", "stride", "offset"),
    [
        (lambda: monai("SegResNet", init_filters=8), "down_layers.3", 64, 8, 0.0),
        pytest.param(lambda: dynunet(*CUBE), "bottleneck", 16, 8, 0.0, marks=SLOW),
        (lambda: dynunet(*FLAT), "bottleneck", 16, (2, 4, 4), 0.0),
        (
            lambda: monai(
                "UNETR",
                in_channels=1,
                out_channels=2,
                img_size=64,
                feature_size=4,
                hidden_size=24,
                mlp_dim=32,
                num_heads=4,
            ),
            "encoder4",
            32,
            8,
            3.5,
        ),
    ],
    ids=["SegResNet", "DynUNet", "DynUNet anisotropic", "UNETR"],
)
def test_monai_networks_are_measured(network, path: str, channels: int, stride: int | tuple, offset: float):
    tap = Backbone(network(), {"tap": path}).taps["tap"]
    assert tap.channels == channels
    assert tap.stride == (stride if isinstance(stride, tuple) else (stride,) * 3)
    assert tap.offset == (offset,) * 3


@SLOW
def test_windows_of_swinunetr_move_no_coordinates():
    network = monai(
        "SwinUNETR", in_channels=1, out_channels=2, feature_size=12, depths=(2, 1, 1, 1), num_heads=(1,) * 4
    )
    taps = Backbone(network, {"patches": "swinViT.patch_embed", "bottleneck": "encoder10", "decoder": "decoder5"}).taps
    for name, stride in (("patches", 2), ("bottleneck", 32), ("decoder", 16)):
        assert taps[name].stride == (stride,) * 3
        assert taps[name].offset == ((stride - 1) / 2,) * 3


def saliency(network: nn.Module, path: str, stride: int, side: int = 64, short: int = 32) -> float:
    """Centroid of the squared gradient of a random mix of one feature's channels, less ``stride · f``."""
    draw, found, places = torch.Generator().manual_seed(0), {}, []
    network.eval().get_submodule(path).register_forward_hook(lambda _, __, output: found.update(f=output))
    for _ in range(2):
        image = torch.randn(1, 1, side, short, short, generator=draw, requires_grad=True)
        network(image)
        value = found["f"]
        middle = [n // 2 for n in value.shape[2:]]
        for f in range(middle[0] - 2, middle[0] + 2):
            mix = value[0, :, f, middle[1], middle[2]] @ torch.randn(value.shape[1], generator=draw)
            (gradient,) = torch.autograd.grad(mix, image, retain_graph=True)
            profile = gradient[0, 0].square().sum((1, 2))
            places.append((profile @ torch.arange(float(side)) / profile.sum()).item() - stride * f)
    return sum(places) / len(places)


@pytest.mark.parametrize(
    ("network", "path"),
    [
        pytest.param(
            lambda: unet(features=(8, 8, 16, 16, 16, 8), norm="instance"), "down_3.convs.conv_0.conv", marks=SLOW
        ),
        (lambda: unet(features=(8, 8, 16, 16, 16, 8), norm="instance"), "upcat_3.convs.conv_0.conv"),
        pytest.param(lambda: monai("SegResNet", init_filters=8), "down_layers.3.1", marks=SLOW),
        pytest.param(lambda: dynunet(*CUBE), "bottleneck", marks=SLOW),
        (lambda: dynunet(*CUBE), "upsamples.0"),  # the skip at 0 beside the bottleneck, upsampled, at -2
    ],
    ids=["unet encoder", "unet decoder", "SegResNet", "DynUNet", "DynUNet decoder"],
)
def test_measured_places_are_those_that_the_untouched_network_is_most_sensitive_to(network, path: str):
    """Random kernels, norms and activations all in place: the probe's linear picture holds for the real thing."""
    network = network()
    tap = Backbone(network, {"tap": path}).taps["tap"]
    assert saliency(network, path, tap.stride[0]) == pytest.approx(tap.offset[0], abs=0.6)


# --- how much is run --------------------------------------------------------------------------------------------------


def test_encoder_taps_run_no_decoder_and_are_the_same_features():
    backbone, ran = narrow().eval(), []
    for name, module in backbone.network.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    image = torch.rand(2, 1, 32, 32, 32)
    with torch.no_grad():
        few = backbone(image, ["encoder.1", "bottleneck"])
        assert set(few) == {"encoder.1", "bottleneck"}
        assert "down_3.convs.conv_1.conv" in ran
        assert not [name for name in ran if name.startswith(("upcat", "final"))]
        everything = backbone(image, list(backbone.taps), output=True)
        assert [name for name in ran if name.startswith("upcat_1")]
    assert set(everything) == {*backbone.taps, "output"}
    for name in few:
        assert torch.equal(few[name], everything[name])
    assert torch.equal(everything["output"], backbone.network(image))


def test_a_stopped_pass_leaves_no_hook_and_gives_gradients():
    backbone = narrow()
    backbone(torch.rand(2, 1, 32, 32, 32), ["encoder.2"])["encoder.2"].sum().backward()
    assert not any(module._forward_hooks for module in backbone.network.modules())
    assert backbone.network.down_2.convs.conv_0.conv.weight.grad.abs().sum() > 0
    assert backbone.network.down_3.convs.conv_0.conv.weight.grad is None


# --- padding ----------------------------------------------------------------------------------------------------------


def test_reflect_padding_reaches_every_padded_convolution_and_moves_no_tap():
    zeros, reflect = narrow(), narrow(padding="reflect")
    assert reflect.taps == zeros.taps
    image = torch.rand(1, 1, 16, 16, 16)
    conv = reflect.network.conv_0.conv_0.conv
    expected = F.conv3d(F.pad(image, [1] * 6, mode="reflect"), conv.weight, conv.bias)
    torch.testing.assert_close(conv(image), expected)
    padded = [m for m in reflect.modules() if isinstance(m, nn.Conv3d) and m.kernel_size != (1, 1, 1)]
    assert {m.padding_mode for m in padded} == {"reflect"}
    one, two = (
        backbone.eval()(torch.rand(1, 1, 32, 32, 32).fill_(0.7), ["encoder.0"]) for backbone in (zeros, reflect)
    )
    assert torch.equal(one["encoder.0"][..., 4:-4, 4:-4, 4:-4], two["encoder.0"][..., 4:-4, 4:-4, 4:-4])
    spread = [value["encoder.0"].flatten(2).std(2).max().item() for value in (one, two)]
    assert spread[1] < 1e-6 < spread[0]  # zeros show the border of a constant image, reflection does not


def test_channels_last_changes_the_memory_and_nothing_else():
    plain, last = narrow().eval(), narrow(channels_last=True).eval()
    assert last.taps == plain.taps
    image = torch.rand(2, 1, 32, 32, 32)
    with torch.no_grad():
        one, two = (backbone(image, ["bottleneck", "decoder.1"], output=True) for backbone in (plain, last))
    assert two["decoder.1"].is_contiguous(memory_format=torch.channels_last_3d)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


# --- refusals ---------------------------------------------------------------------------------------------------------


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.unused = nn.Conv3d(1, 2, 3, padding=1), nn.ReLU(inplace=True), nn.Conv3d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


def test_taps_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="name the taps of InPlace"):
        Backbone(InPlace())
    with pytest.raises(InputError, match=r"tap 'a' names no submodule 'cnv'.*conv"):
        Backbone(InPlace(), {"a": "cnv"})
    with pytest.raises(InputError, match=r"tap 'a' \('unused'\) is not used"):
        Backbone(InPlace(), {"a": "unused"})
    with pytest.raises(InputError, match=r"overwrites tap 'a' \('conv'\) in place; tap what follows"):
        Backbone(InPlace(), {"a": "conv"})(torch.rand(1, 1, 8, 8, 8), ["a"], output=True)
    assert Backbone(InPlace(), {"a": "act"})(torch.rand(1, 1, 8, 8, 8), ["a"], output=True)["a"].min() >= 0


def test_unknown_taps_and_undivided_sides_are_refused_with_what_would_do():
    backbone = narrow()
    with pytest.raises(InputError, match=r"no tap 'encoder.9'; the backbone has encoder.0, .*decoder.0"):
        backbone(torch.rand(1, 1, 16, 16, 16), ["encoder.9"])
    with pytest.raises(
        InputError, match=r"40 voxels is not divisible by 16, the stride of tap 'bottleneck'; use 32 or 48"
    ):
        backbone.check_size((32, 40, 32))
    with pytest.raises(InputError, match=r"16 voxels leaves a single feature at tap 'bottleneck'.*use 32 or more"):
        backbone.check_size((32, 48, 16))
    backbone.check_size((32, 48, 64))


def test_a_network_that_takes_no_cube_says_why():
    with pytest.raises(InputError, match=r"and 2 channel\(s\) .* it says: .*1, 3, 3, 3"):
        narrow(in_channels=2).upstream_parameters(["bottleneck"])


@pytest.mark.parametrize("grad", [True, False])
def test_only_what_the_taps_need_is_trained(grad: bool):
    """Distributed training would wait for the gradients of the rest."""
    backbone = Backbone(unet(features=(4, 4, 4, 4, 4, 4)), unet_taps()).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with torch.set_grad_enabled(grad):
        backbone.freeze_unused(["encoder.2"])
    for name, value in backbone.state_dict().items():  # running statistics are untouched by the probe
        assert torch.equal(value, before[name]), name
    trained = {name for name, value in backbone.named_parameters() if value.requires_grad}
    image = torch.rand(1, 1, 32, 32, 32)
    backbone(image, ["encoder.2"])["encoder.2"].sum().backward()
    assert trained == {name for name, value in backbone.named_parameters() if value.grad is not None}
    assert any("down_2" in name for name in trained)
    assert not any("upcat" in name or "down_3" in name for name in trained)
    assert backbone.training
    backbone = Backbone(unet(features=(4, 4, 4, 4, 4, 4)), unet_taps())
    backbone.freeze_unused(["encoder.2"], output=True)
    assert all(value.requires_grad for value in backbone.parameters())


def test_shares_of_taps_add_up_to_one():
    backbone = Backbone(nn.Sequential(nn.Conv3d(1, 2, 1), nn.Conv3d(2, 2, 1)), {"a": "0", "b": "1"})
    assert backbone.normalised_weights(["a", "b"], None) == {"a": 0.5, "b": 0.5}
    assert backbone.normalised_weights(["a", "b"], {"a": 3.0, "b": 1.0}) == {"a": 0.75, "b": 0.25}
    assert backbone.normalised_weights(["a", "b"], {"a": 3.0}) == {"a": 1.0}
    for wrong in ({"c": 1.0}, {"a": 0.0}, {"a": 2.0, "b": -1.0}):
        with pytest.raises(InputError, match="tap_weights"):
            backbone.normalised_weights(["a", "b"], wrong)
