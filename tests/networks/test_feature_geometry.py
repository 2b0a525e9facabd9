"""Strides and centre offsets as measured, against closed forms and against real networks on a ramp."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

from lssl.networks import backbone
from lssl.networks.backbone import Backbone
from lssl.networks.feature_geometry import Tap, measure
from lssl.utils.errors import InputError
from lssl.views import geometry as geo

SIZE = 64


def chain(kernel: int, stride: int | tuple, padding: int, levels: int = 3) -> nn.Module:
    return nn.Sequential(*[nn.Conv3d(1, 1, kernel, stride, padding) for _ in range(levels)])


class Mix(nn.Module):
    """A strided 3×3×3 convolution beside a mean-pooled skip, as in residual encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv3d(1, 1, 3, 2, 1), nn.AvgPool3d(2)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (self.conv(x) + self.pool(x))


class UpDown(nn.Module):
    """Down by a kernel and up by another, with whatever lies between."""

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down, self.up = down, up

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


NETWORKS = {
    "k2s2": (chain(2, 2, 0), 8, 3.5),
    "k3s2p1": (chain(3, 2, 1), 8, 0.0),
    "k4s2p1": (chain(4, 2, 1), 8, 3.5),
    "k5s1p2": (chain(5, 1, 2), 1, 0.0),
    "max pooling": (nn.Sequential(*[nn.MaxPool3d(2) for _ in range(3)]), 8, 3.5),
    "mean pooling": (nn.AvgPool3d(4), 4, 1.5),
    "patches": (nn.Conv3d(1, 1, 16, 16), 16, 7.5),
    "dilated": (nn.Conv3d(1, 1, 3, 2, 2, dilation=2), 2, 0.0),
    "down k2, up k2": (UpDown(chain(2, 2, 0, 2), nn.ConvTranspose3d(1, 1, 2, 2)), 2, 0.5),
    "down k3, up k2": (UpDown(chain(3, 2, 1, 2), nn.ConvTranspose3d(1, 1, 2, 2)), 2, -1.0),
    "down k2, trilinear": (UpDown(chain(2, 2, 0, 2), nn.Upsample(scale_factor=2, mode="trilinear")), 2, 0.5),
    "norm and activation": (
        nn.Sequential(nn.Conv3d(1, 8, 4, 2, 1), nn.InstanceNorm3d(8, affine=True), nn.LeakyReLU(), nn.Conv3d(8, 4, 1)),
        2,
        0.5,
    ),
}


def on_a_ramp(network: nn.Module, stride: int, axis: int) -> float:
    """Centre of feature 0, read off the network itself in float64 with uniform kernels and no other parameter."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            nn.init.constant_(module.weight, 1.0)
            nn.init.zeros_(module.bias)
    ramp = torch.arange(SIZE, dtype=torch.float64).view([-1 if a == axis else 1 for a in range(3)])
    ramp = ramp.expand(1, 1, SIZE, SIZE, SIZE)
    with torch.no_grad():
        moment, mass = network.double()(ramp), network(torch.ones_like(ramp))
    middle = moment.shape[-1] // 2
    # twice: a transposed convolution has one place for each of its two phases
    places = [(moment / mass)[0, 0].movedim(axis, 0)[i, middle, middle] - stride * i for i in (middle, middle + 1)]
    return (sum(places) / 2).item()


@pytest.mark.parametrize("name", NETWORKS)
def test_centre_offsets_in_closed_form(name: str):
    network, stride, offset = NETWORKS[name]
    tap = measure(network, {"last": ""}, 1).taps["last"]
    assert tap.stride == (stride,) * 3
    assert tap.offset == (offset,) * 3


LINEAR = [name for name in NETWORKS if name not in ("max pooling", "norm and activation")]


@pytest.mark.parametrize("name", LINEAR)
def test_centre_offsets_as_the_network_itself_places_a_ramp(name: str):
    network, stride, offset = NETWORKS[name]
    assert on_a_ramp(network, stride, axis=1) == pytest.approx(offset, abs=1e-9)


def energy_centroid(network: nn.Module, stride: int, axis: int) -> float:
    """Of the middle features of a linear network of one channel, whose gradient autograd gives exactly."""
    image = torch.zeros(1, 1, SIZE, SIZE, SIZE, requires_grad=True)
    features = network(image)[0, 0]
    middle = len(features) // 2
    at = [middle if a != axis else slice(middle, middle + 1) for a in range(3)]
    (gradient,) = torch.autograd.grad(features[tuple(at)].sum(), image)
    profile = gradient[0, 0].movedim(axis, 0).double().square().sum((1, 2))
    return (profile @ torch.arange(float(SIZE)).double() / profile.sum()).item() - stride * middle


@pytest.mark.parametrize("seed", [0, 1])
def test_paths_of_different_centres_count_by_the_energy_of_their_gradient(seed):
    """Means of both centres would be 0.25 and 0.75."""
    torch.manual_seed(seed)
    network = nn.Sequential(Mix(), Mix())
    tap = measure(network, {"last": ""}, 1).taps["last"]
    assert tap.stride == (4, 4, 4)
    assert 0 < max(tap.uncertainty) < 2
    for axis in range(3):
        assert tap.offset[axis] == pytest.approx(energy_centroid(network, 4, axis), abs=min(0.3, tap.uncertainty[axis]))


def test_a_path_without_weight_has_no_part_in_the_place():
    network = Mix()
    nn.init.zeros_(network.conv.weight)
    offsets = measure(network, {"last": ""}, 1).taps["last"].offset
    assert offsets == pytest.approx((0.5, 0.5, 0.5), abs=0.05)
    nn.init.constant_(network.conv.weight, 100.0)
    offsets = measure(network, {"last": ""}, 1).taps["last"].offset
    assert offsets == pytest.approx((0.0, 0.0, 0.0), abs=0.1)


def test_align_corners_is_refused_and_its_displacement_named():
    network = nn.Sequential(nn.Conv3d(1, 2, 2, 2), nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True))
    with pytest.raises(InputError, match=r"tap 'last' do not lie on a regular grid: .* displaced by .* align_corners"):
        measure(network, {"last": "1"}, 1)
    with pytest.raises(InputError, match="regular grid"):
        Backbone(BasicUNet(3, 1, 2, (4,) * 6, upsample="nontrainable"), {"up": "upcat_1"})


def test_an_uncertain_place_is_said(monkeypatch):
    taps = {"last": Tap("last", 1, (4, 4, 4), (0.0, 0.0, 0.0), (0.0, 1.1, 0.0))}
    with pytest.warns(UserWarning, match=r"tap 'last'.* uncertain by 1.1 voxels, 28% of its stride"):
        backbone._warn_of_uncertain_places(taps)


def test_a_checkpoint_carries_the_places():
    one, other = (Backbone(nn.Sequential(Mix(), nn.Conv3d(1, 2, 1)), {"last": "1"}) for _ in range(2))
    one.set_places({"last": [0.1, 0.2, 0.3], "gone": [0, 0, 0]})
    other.set_places(one.places())
    assert other.taps["last"].offset == (0.1, 0.2, 0.3)


def test_axes_are_measured_apart():
    network = nn.Sequential(nn.Conv3d(1, 1, (1, 2, 4), (1, 2, 4)), nn.Conv3d(1, 6, 3, (1, 2, 1), 1))
    tap = measure(network, {"last": "1"}, 1).taps["last"]
    assert tap == Tap("1", 6, (1, 4, 4), (0.0, 0.5, 1.5))


def test_several_channels_and_the_output():
    network = nn.Sequential(nn.Conv3d(2, 5, 2, 2), nn.ReLU(), nn.Conv3d(5, 3, 1))
    measured = measure(network, {"first": "0", "last": "2"}, 2)
    assert [measured.taps[name].channels for name in ("first", "last")] == [5, 3]
    assert measured.out_channels == 3


def test_the_network_is_left_as_it_was():
    network = nn.Sequential(nn.Conv3d(1, 4, 3, 2, 1), nn.BatchNorm3d(4), nn.ReLU()).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    measure(network, {"last": "2"}, 1)
    assert network.training
    assert network[0].padding_mode == "zeros"
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# --- end to end: features of a real network with random kernels -------------------------------------------------------


@pytest.mark.parametrize("down", [(2, 0), (3, 1), (4, 1)])  # kernel and padding
def test_features_of_shifted_views_align_to_the_bit_of_an_index_shift(down: tuple):
    """Views cut whole strides apart: the aligned feature of one is the other's, whatever the kernels."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(1, 4, down[0], 2, down[1]), nn.LeakyReLU(), nn.Conv3d(4, 6, down[0], 2, down[1])
    ).double()
    tap = measure(network, {"last": "2"}, 1).taps["last"]
    source = torch.randn(1, 1, 56, 48, 40, dtype=torch.float64)
    crop = (slice(None), slice(None), slice(4, 36), slice(0, 32), slice(8, 40))
    moved = (slice(None), slice(None), slice(12, 44), slice(4, 36), slice(4, 36))
    with torch.no_grad():
        one, two = network(source[crop]), network(source[moved])
    g1, g2 = (
        geo.feature_affine(geo.translation(torch.tensor([o], dtype=torch.float64)), tap.stride, tap.offset)
        for o in ((4, 0, 8), (12, 4, 4))
    )
    aligned, valid = geo.align(two, g2, g1, one.shape[2:], margin=1)
    assert valid.sum() > 50
    where = valid[:, None].expand_as(one)
    torch.testing.assert_close(aligned[where], one[where], rtol=0, atol=1e-9)
    torch.testing.assert_close(aligned[:, :, 3:-1, 2:-1, 1:-2], two[:, :, 1:-3, 1:-2, 2:-1], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("down", "right"), [((2, 0), 0.5), ((3, 1), 0.0)])
def test_features_of_a_mirrored_view_align_with_the_measured_offset(down: tuple, right: float):
    """Kernels that are their own mirror image see a mirrored smooth image as the mirror of its features."""
    torch.manual_seed(0)
    conv = nn.Conv3d(1, 4, down[0], 2, down[1]).double()
    conv.weight.data = conv.weight.data + conv.weight.data.flip(2)
    tap = measure(conv, {"last": ""}, 1).taps["last"]
    smooth = torch.randn(1, 1, 48, 16, 16, dtype=torch.float64)
    for _ in range(3):
        smooth = F.avg_pool3d(smooth, (9, 1, 1), 1, (4, 0, 0))
    with torch.no_grad():
        one, two = conv(smooth), conv(smooth.flip(2))
    maps = geo.flip(torch.tensor([[True, False, False]]), smooth.shape[2:]), torch.eye(4, dtype=torch.float64)[None]

    def error(offset: tuple[float, ...]) -> float:
        g2, g1 = (geo.feature_affine(affine, tap.stride, offset) for affine in maps)
        aligned, valid = geo.align(two, g2, g1, one.shape[2:], margin=1)
        return (((aligned - one) * valid[:, None]).norm() / (one * valid[:, None]).norm()).item()

    assert tap.offset[0] == right
    assert error(tap.offset) < (1e-9 if right == 0.5 else 0.02)
    assert error((0.5 - right,) * 3) > 0.03


def test_a_tap_that_does_not_see_the_image_is_refused():
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.inner(torch.zeros_like(x))
            return x

    with pytest.raises(InputError, match="does not depend on the image"):
        measure(Blind(), {"last": "inner"}, 1)


def test_a_tap_that_is_no_map_or_no_whole_stride_is_refused():
    with pytest.raises(InputError, match="a tap is a"):
        measure(nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten()), {"last": "1"}, 1)
    with pytest.raises(InputError, match="stride is not a whole number"):
        measure(nn.Conv3d(1, 1, 3, 1, 0), {"last": ""}, 1)
