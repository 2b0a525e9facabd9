"""Alignment end to end: source → view → network → features of view 2 on view 1's lattice, against the closed form.

The sources hold their own places in mm, so a feature of the *linearised* network (uniform kernels, no norms, no
activations; what `measure` probes) is the mean place of its receptive field: wherever the field sees no border, its
centre. View 2's map, aligned onto view 1's lattice, must then read ``G₁ f`` at every feature f. Offsets are written
down here in closed form, not measured.

What stays out: a transposed 2×2×2 convolution copies each coarse feature to two fine ones a side, so behind it a place
is right on average only; that average is tested at the end. The default network's decoder sees 200 voxels a side and
leaves no interior in a view of any reasonable size, so its encoder taps are compared, and the decoders of small ones.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.networks.backbone import Backbone, unet, unet_taps
from lssl.networks.linear_probe import LinearMode, without_parameters
from lssl.networks.tapped import StopForward, tapped
from lssl.views import geometry as geo
from lssl.views.sampler import View, ViewSampler

D64 = torch.float64
TOLERANCE = 1e-4  # feature voxels


class Hourglass(nn.Module):
    """Two strided levels, and up again beside a skip connection; whatever strides and rises is given."""

    def __init__(self, down: Callable[[int, int], nn.Module], up: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.up = down(1, 3), down(3, 3), up
        self.skip = nn.Conv3d(3, 3, 1)
        self.decoder = nn.Sequential(nn.Conv3d(6, 4, 1), nn.InstanceNorm3d(4, affine=True), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        fine = self.first(x)
        return self.decoder(torch.cat([self.skip(fine), self.up(self.second(fine))], 1))


def convolution(kernel: int, padding: int) -> Callable[[int, int], nn.Module]:
    return lambda i, o: nn.Sequential(nn.Conv3d(i, o, kernel, 2, padding), nn.InstanceNorm3d(o), nn.LeakyReLU())


def pooling(i: int, o: int) -> nn.Module:
    return nn.Sequential(nn.Conv3d(i, o, 3, 1, 1), nn.ReLU(), nn.MaxPool3d(2))


def trilinear() -> nn.Module:
    return nn.Upsample(scale_factor=2, mode="trilinear")


class SwinEncoder(nn.Module):
    """The encoder of MONAI's SwinUNETR; its decoder costs ten times as much."""

    def __init__(self) -> None:
        from monai.networks.nets import SwinUNETR

        super().__init__()
        self.swinViT = SwinUNETR(
            in_channels=1, out_channels=2, feature_size=12, depths=(2, 1, 1, 1), num_heads=(1,) * 4, window_size=4
        ).swinViT

    def forward(self, x: Tensor) -> Tensor:
        return self.swinViT(x)[-1]


def narrow_unet() -> nn.Module:
    return unet(features=(2,) * 6, norm="instance")


def unet_encoder(*taps: str) -> dict[str, tuple[int, float, int]]:
    """Strides 1 to 16 by pooling; two 3×3×3 convolutions a level reach 2, 4, 10, 22 (or 30), 46 voxels."""
    levels = {"encoder.0": (0, 2), "encoder.1": (1, 2), "encoder.2": (2, 3), "encoder.3": (3, 3)}
    levels |= {"skip.3": (3, 4), "bottleneck": (4, 3)}
    return {unet_taps()[tap]: (2 ** levels[tap][0], (2 ** levels[tap][0] - 1) / 2, levels[tap][1]) for tap in taps}


@dataclass
class Case:
    """A network, its taps as path → (stride, offset of each axis, features from the border that padding reaches)."""

    network: Callable[[], nn.Module]
    taps: dict[str, tuple[int, float, int]]
    view: tuple[int, int, int] = (48, 40, 32)
    source: tuple[int, int, int] = (104, 98, 92)
    pairs: int = 3
    sampler: dict = field(default_factory=lambda: {"zoom": (0.7, 1.3), "rotation": 20.0})


CASES = {
    "k2s2": Case(
        lambda: Hourglass(convolution(2, 0), trilinear()),
        {"first": (2, 0.5, 1), "second": (4, 1.5, 1), "decoder": (2, 0.5, 3)},
    ),
    "k3s2p1": Case(
        lambda: Hourglass(convolution(3, 1), trilinear()),
        # the decoder lies half-way between the skip connection (0) and what rises from below (-1)
        {"first": (2, 0.0, 1), "second": (4, 0.0, 1), "decoder": (2, (0.0 - 1.0) / 2, 3)},
    ),
    "k4s2p1": Case(lambda: Hourglass(convolution(4, 1), trilinear()), {"first": (2, 0.5, 1), "second": (4, 1.5, 1)}),
    "pooling": Case(
        lambda: Hourglass(pooling, trilinear()),
        {"first": (2, 0.5, 1), "second": (4, 1.5, 1), "decoder": (2, 0.5, 4)},
    ),
    "unet": Case(narrow_unet, unet_encoder("encoder.0", "encoder.1", "encoder.2")),
    "deep unet": Case(  # apart: among two million features of stride 1, float32's rounding comes to 1e-4
        narrow_unet,
        unet_encoder("encoder.2", "encoder.3", "skip.3", "bottleneck"),
        view=(160, 144, 128),
        source=(186, 170, 156),
        pairs=1,
        sampler={"zoom": (0.85, 1.0), "rotation": 6.0, "overlap": 0.7},
    ),
    "swin": Case(
        SwinEncoder,
        {"swinViT.patch_embed": (2, 0.5, 0)}
        | {f"swinViT.layers{i}.0": (2 ** (i + 1), (2 ** (i + 1) - 1) / 2, 0) for i in (1, 2, 3, 4)},
        view=(128, 96, 96),
        source=(176, 150, 150),
        pairs=1,
        sampler={"zoom": (1.0, 1.1), "rotation": 10.0, "overlap": 0.6},
    ),
}


def places(network: nn.Module, paths: list[str], image: Tensor) -> dict[str, Tensor]:
    """Tap → ``(B, 3, ...)``: mean place of each feature's receptive field; ``image`` is a view of places."""
    probe, names = without_parameters(network).to(memory_format=torch.channels_last_3d), {path: path for path in paths}

    def features(x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad(), LinearMode(len(x)), tapped(probe, names, stop=True) as found, suppress(StopForward):
            probe(x)
        return found

    mass = features(torch.ones(1, 1, 64, 64, 64))
    one_by_one = [features(channel) for channel in image.flatten(0, 1)[:, None, None]]  # together they take gigabytes
    return {
        path: (torch.cat([found[path] for found in one_by_one]).mean(1) / mass[path].mean((1, 2, 3, 4)))
        .double()
        .unflatten(0, image.shape[:2])
        for path in paths
    }


def around_the_origin(batch: PairBatch) -> PairBatch:
    """Moves the sources until their middles lie at 0 and 2 mm aside: views are found in both, and float32 is finest."""
    middle = (torch.tensor(batch.images.shape[-3:], dtype=D64) - 1) / 2
    place = geo.transform(batch.affines, middle.expand(len(batch), 2, 1, 3)).squeeze(2)
    batch.affines[..., :3, 3] -= place - torch.tensor([[0.0, 0.0, 0.0], [2.0, -1.0, 1.5]])
    batch.images = geo.transform(batch.affines, geo.lattice(batch.images.shape[-3:]).expand(len(batch), 2, -1, -1))
    batch.images = batch.images.mT.unflatten(-1, batch.foreground.shape[-3:]).float()
    return batch


@pytest.fixture(scope="module")
def shown(make_batch) -> Callable[[str], tuple[View, View, dict[str, Tensor], dict[str, Tensor]]]:
    """Name of a case → both views and what each tap shows of them; made once."""
    known: dict[str, tuple] = {}

    def show(name: str) -> tuple:
        if name not in known:
            case = CASES[name]
            torch.manual_seed(0)
            batch = around_the_origin(make_batch(case.pairs, case.source, seed=3))
            sampler = ViewSampler(
                case.view,
                **{
                    "transforms": [],
                    "affine_probability": 1.0,
                    "flip": (0.5, 0.5, 0.5),
                    "flip_together": False,
                    "overlap": 0.5,
                    **case.sampler,
                },
            )
            views = sampler(batch, torch.Generator().manual_seed(2))
            network = case.network()
            known[name] = (*views, *(places(network, list(case.taps), view.image) for view in views))
        return known[name]

    return show


def lattice_affine(view: View, stride: int, offset: float) -> Tensor:
    """``G (B, 4, 4)`` from scratch: feature f is centred at view index ``stride f + offset``."""
    return view.affine @ torch.tensor(
        [[stride, 0, 0, offset], [0, stride, 0, offset], [0, 0, stride, offset], [0, 0, 0, 1]], dtype=D64
    )


def aligned_places(
    found: tuple, path: str, stride: int, offset: float, margin: float
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """View 2's places on view 1's lattice ``(B, N, 3)``, which of them count, and the lattice."""
    first, second, one, two = found
    size = tuple(one[path].shape[2:])
    g1, g2 = (geo.feature_affine(view.affine, (stride,) * 3, (offset,) * 3) for view in (first, second))
    aligned, valid = geo.align(two[path], g2, g1, size, margin)
    return aligned.flatten(2).transpose(1, 2), valid.flatten(1), size


def in_features(view: View, stride: int, offset: float, points: Tensor) -> Tensor:
    """Places in mm as feature indices."""
    return geo.transform(torch.linalg.inv(lattice_affine(view, stride, offset)), points)


TAPS = [(name, path) for name, case in CASES.items() for path in case.taps]


@pytest.mark.parametrize(("name", "path"), TAPS, ids=[f"{name}-{path}" for name, path in TAPS])
def test_aligned_features_lie_at_the_closed_form(shown, name: str, path: str):
    stride, offset, reach = CASES[name].taps[path]
    found = shown(name)
    aligned, valid, size = aligned_places(found, path, stride, offset, reach)
    assert len(set(size)) > 1  # not cubic
    error = (in_features(found[0], stride, offset, aligned) - geo.lattice(size)).abs().amax(-1)[valid]
    assert len(error) >= 4
    assert error.max() < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_measured_taps_are_the_closed_form(name: str):
    case = CASES[name]
    taps = Backbone(case.network(), {f"tap.{i}": path for i, path in enumerate(case.taps)}).taps.values()
    for tap, (stride, offset, _) in zip(taps, case.taps.values(), strict=True):
        assert tap.stride == (stride,) * 3
        several = any(tap.uncertainty)  # a skip at 0 beside a path at -1, each as strong as its random weights make it
        assert tap.offset == pytest.approx((offset,) * 3, abs=0.25 * stride if several else 0)


@pytest.mark.parametrize("name", CASES)
def test_views_are_mirrored_turned_and_zoomed_apart(shown, name: str):
    """And show nothing but their sources; or the tests above would prove little, or zeros."""
    first, second, *_ = shown(name)
    maps = [torch.linalg.inv(view.source_affine) @ view.affine for view in (first, second)]
    signs = [m[:, :3, :3].diagonal(dim1=1, dim2=2).sign() for m in maps]
    assert (signs[0] != signs[1]).any()
    between = (torch.linalg.inv(maps[0]) @ maps[1])[:, :3, :3]
    assert (between.abs() - torch.eye(3, dtype=D64)).abs().amax((1, 2)).min() > 0.02
    for view in (first, second):
        inner = geo.lattice(view.size)[geo.contains(geo.lattice(view.size), view.size, 1.0)]
        assert view.contains(geo.transform(view.affine, inner)).all()
        step = view.affine[:, :3, :3].norm(dim=1)
        assert ((step.amax(1) / step.amin(1)) > 1.05).all()


# (network, tap, wrong offset): half-voxel conventions that are common and wrong
MISTAKES = [
    ("k3s2p1", "second", 1.5),  # (s - 1)/2 for a padded 3×3×3 kernel
    ("k3s2p1", "first", 0.5),
    ("k2s2", "second", 0.0),  # the offset dropped
    ("k2s2", "first", 0.0),
    ("pooling", "second", 0.0),
    ("deep unet", "down_3.convs.conv_1.conv", 0.0),
    ("swin", "swinViT.layers3.0", 0.0),
]


@pytest.mark.parametrize(("name", "path", "wrong"), MISTAKES, ids=[f"{n}-{p}-{w}" for n, p, w in MISTAKES])
def test_the_wrong_offset_is_off_by_a_third_of_a_feature(shown, name: str, path: str, wrong: float):
    """Against view 1's own features, which lie where they lie whatever offset is believed."""
    stride, right, reach = CASES[name].taps[path]
    found = shown(name)
    own = in_features(found[0], stride, right, found[2][path].flatten(2).transpose(1, 2))
    errors = {}
    for offset in (right, wrong):
        aligned, valid, _ = aligned_places(found, path, stride, offset, reach)
        errors[offset] = (in_features(found[0], stride, right, aligned) - own).abs().amax(-1)[valid].max().item()
    assert errors[right] < TOLERANCE
    assert errors[wrong] > 0.3


@pytest.mark.parametrize(("kernel", "padding", "offset"), [(2, 0, 0.5), (3, 1, -0.5)])
def test_behind_a_transposed_convolution_places_are_right_on_average(make_batch, kernel: int, padding: int, offset):
    """One coarse feature is copied to two fine ones a side: right over every whole coarse feature, not one by one."""
    network = Hourglass(convolution(kernel, padding), nn.ConvTranspose3d(3, 3, 2, 2))
    tap = Backbone(network, {"decoder": "decoder"}).taps["decoder"]
    assert tap.offset == pytest.approx((offset,) * 3, abs=0.5 if any(tap.uncertainty) else 0)
    batch = around_the_origin(make_batch(2, (80, 72, 60)))
    view, _ = ViewSampler((48, 40, 32), transforms=[], flip=(0.5, 0.5, 0.5))(batch, torch.Generator().manual_seed(0))
    found = in_features(view, 2, offset, places(network, ["decoder"], view.image)["decoder"].flatten(2).mT)
    away = (found - geo.lattice((24, 20, 16))).unflatten(1, (24, 20, 16))[:, 4:-4, 4:-4, 4:-4]
    assert away.abs().max() > 0.2
    assert away.mean((1, 2, 3)).abs().max() < TOLERANCE
