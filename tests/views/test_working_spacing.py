"""Views of visits of different voxel sizes: one geometry in mm, from one interpolation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lssl.data.batch import PairBatch, Visit, collate
from lssl.views import geometry as geo
from lssl.views.sampler import View, ViewSampler

THIN, CUBIC = (0.8, 0.8, 5.0), (3.0, 3.0, 3.0)
WORKING = (2.0, 2.0, 3.5)
BOX = (120.0, 120.0, 120.0)  # mm of each visit


def ramp(spacing: tuple[float, float, float], turned: float = 0.0, extent: tuple[float, ...] = BOX) -> Visit:
    """A visit centred on the origin whose three channels are the place of each voxel in mm."""
    size = [round(length / side) for length, side in zip(extent, spacing, strict=True)]
    middle = (torch.tensor(size, dtype=torch.float64) - 1) / 2
    turn = geo.rotation(torch.tensor([turned, 0.0, -turned], dtype=torch.float64))
    affine = turn @ geo.scaling(torch.tensor(spacing, dtype=torch.float64)) @ geo.translation(-middle)
    image = geo.transform(affine, geo.lattice(size)).T.reshape(3, *size).float()
    return Visit(image, affine, torch.ones(size, dtype=torch.bool), age=50.0)


def mixed() -> PairBatch:
    """Pairs of thin voxels, of cubic ones, and of one visit each."""
    return collate(
        [(ramp(THIN, 0.05), ramp(THIN, -0.05)), (ramp(CUBIC), ramp(CUBIC, 0.1)), (ramp(THIN), ramp(CUBIC, 0.1))]
    )


def inside(view: View) -> Tensor:
    """``(B, D, H, W)``: voxels whose samples all lie between data."""
    corners = torch.tensor([(a, b, c) for a in (-0.5, 0.5) for b in (-0.5, 0.5) for c in (-0.5, 0.5)])
    lattice = geo.lattice(view.size)
    seen = [view_contains(view, lattice + corner) for corner in corners]
    return torch.stack(seen).all(0).unflatten(1, view.size)


def view_contains(view: View, index: Tensor) -> Tensor:
    source = geo.transform(geo.inverse(view.source_affine) @ view.affine, index)
    return geo.contains(source, view.source_extent[:, None])


@pytest.mark.parametrize("samples", [False, True])
@pytest.mark.parametrize("geometry", ["shared", "independent"])
def test_every_view_has_the_working_spacing_and_shows_the_place_it_says(geometry: str, samples: bool, generator):
    sampler = ViewSampler(16, spacing=WORKING, geometry=geometry, zoom=(1.0, 1.0), affine_probability=1.0)
    sampler.transforms = []
    if samples:
        steps = np.array([[w / s for w, s in zip(WORKING, size, strict=True)] for size in (THIN, CUBIC)])
        sampler.resample_to(WORKING, steps)
        assert sampler.samples == (3, 3, 1)  # 2.5 and 0.7 voxels
    for view in sampler(mixed(), generator):
        wanted = torch.tensor(WORKING, dtype=torch.float64).expand(3, 3)
        torch.testing.assert_close(geo.spacing(view.affine), wanted, rtol=1e-12, atol=0)
        places = geo.transform(view.affine, geo.lattice(view.size)).transpose(1, 2).unflatten(2, view.size)
        valid = inside(view)
        assert valid.flatten(1).float().mean(1).min() > 0.5
        error = (view.image - places).abs().amax(1)[valid]
        assert error.max() < 1e-3  # mm


def test_zoom_and_mirror_act_on_the_working_spacing(generator):
    sampler = ViewSampler(16, spacing=WORKING, zoom=(1.1, 1.1), rotation=0.0, affine_probability=1.0, transforms=[])
    for view in sampler(mixed(), generator):
        wanted = 1.1 * torch.tensor(WORKING, dtype=torch.float64).expand(3, 3)
        torch.testing.assert_close(geo.spacing(view.affine), wanted, rtol=1e-12, atol=0)


def test_two_visits_of_different_voxels_share_a_box_in_mm(generator):
    sampler = ViewSampler(16, spacing=WORKING, geometry="shared", transforms=[])
    first, second = sampler(collate([(ramp(THIN), ramp(CUBIC))]), generator)
    torch.testing.assert_close(first.affine, second.affine, rtol=0, atol=1e-9)
    both = inside(first) & inside(second)
    difference = (first.image - second.image).abs().amax(1)[both]
    assert both.any()
    assert difference.max() < 1e-3


def test_shifted_views_keep_their_overlap_in_mm(generator):
    """Counted: how many points of the second view lie in the first one's box."""
    sampler = ViewSampler(16, spacing=WORKING, overlap=0.6, flip=(0.0, 0.0, 0.0), affine_probability=0.0)
    sampler.transforms = []
    batch = collate([(ramp(THIN), ramp(THIN)), (ramp(CUBIC), ramp(CUBIC)), (ramp(CUBIC), ramp(THIN))] * 8)
    first, second = sampler(batch, generator)
    points = geo.transform(second.affine, geo.lattice((64, 64, 64)) / 4 - 0.375)
    index = geo.transform(geo.inverse(first.affine), points)
    share = geo.contains(index, first.size, -0.5).float().mean(1)
    assert share.min() > 0.58  # counted on a lattice
    for rows in (slice(0, None, 3), slice(1, None, 3), slice(2, None, 3)):
        assert share[rows].min() < 0.9  # every kind of pair is shifted


def test_labels_keep_their_volume():
    """A box of 15×21×7 voxels of 0.8×0.8×5 mm has 5×7×7 voxels of 2.4×2.4×5 mm."""
    visit = ramp(THIN)
    label = torch.zeros(visit.foreground.shape, dtype=torch.int16)
    label[60:75, 45:66, 8:15] = 7
    visit.label, visit.foreground = label, label > 0
    first, second = ViewSampler((9, 9, 9), spacing=(2.4, 2.4, 5.0)).centred(collate([(visit, visit)]))
    for view in (first, second):
        assert view.label is not None
        count = (view.label == 7).sum()
        assert count == 5 * 7 * 7
        volume = float(count * geo.volume(view.affine)[0])
        assert volume == pytest.approx(15 * 21 * 7 * 0.8 * 0.8 * 5.0, rel=1e-12)


@pytest.mark.parametrize("spacing", [THIN, CUBIC])
def test_volume_of_labels_at_any_ratio(spacing: tuple[float, float, float]):
    """A ball of 30 mm: counted in voxels of the view within 2 % of the count in its own."""
    visit = ramp(spacing)
    label = (visit.image.square().sum(0) < 30**2).short()
    visit.label, visit.foreground = label, label > 0
    view, _ = ViewSampler(48, spacing=(1.7, 1.9, 2.3)).centred(collate([(visit, visit)]))
    assert view.label is not None
    volume = float((view.label == 1).sum() * geo.volume(view.affine)[0])
    assert volume == pytest.approx(float(label.sum()) * spacing[0] * spacing[1] * spacing[2], rel=0.02)


def test_a_coarse_voxel_is_the_mean_of_what_it_covers(generator):
    """Noise of deviation 1, averaged over 4×4×1 voxels, has the deviation 1/4; a single sample would keep more."""
    visit = ramp((1.0, 1.0, 4.0))
    visit.image = torch.randn(1, *visit.image.shape[1:], generator=generator)
    sampler = ViewSampler(16, affine_probability=0.0, transforms=[])
    sampler.resample_to((4.0, 4.0, 4.0), np.array([[4.0, 4.0, 1.0]]))
    view, _ = sampler.centred(collate([(visit, visit)]))
    exact = torch.nn.functional.avg_pool3d(visit.image[None], (4, 4, 1)).std()
    assert view.image.std() == pytest.approx(float(exact), rel=0.1)


class Before(ViewSampler):
    """The formulas from before there was a working spacing."""

    def steps(self, affine: np.ndarray) -> np.ndarray:
        return np.ones_like(geo.spacing(affine))

    def in_voxels(self, linear: np.ndarray, affine: np.ndarray) -> np.ndarray:
        step = geo.spacing(affine)
        return linear * step[..., None, :] / step[..., None]


@pytest.mark.parametrize("geometry", ["shared", "independent"])
def test_one_voxel_size_gives_the_same_bits_as_without_a_working_spacing(make_batch, geometry: str):
    """Also if headers differ by rounding: an affine's columns are 1.1 mm long to 1e-16 at best."""
    batch = make_batch(4, (28, 24, 20), labels=True)
    options = {"size": (12, 12, 10), "geometry": geometry}
    samplers = [Before(**options), ViewSampler(**options), ViewSampler(**options, spacing=(1.1, 0.9, 1.3001))]
    samplers.append(ViewSampler(**options))
    samplers[-1].resample_to((1.1, 0.9, 1.3), np.ones((8, 3)))
    assert samplers[-1].spacing is None
    for draw in ("views", "centred"):
        seeds = [torch.Generator().manual_seed(3) for _ in samplers]
        made = [s(batch, g) if draw == "views" else s.centred(batch) for s, g in zip(samplers, seeds, strict=True)]
        for other in made[1:]:
            for one, same in zip(made[0], other, strict=True):
                assert torch.equal(one.affine, same.affine)
                assert torch.equal(one.image, same.image)
                assert one.label is not None
                assert same.label is not None
                assert torch.equal(one.label, same.label)
