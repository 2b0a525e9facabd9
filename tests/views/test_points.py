"""Corresponding points: on view 1's lattice, seen by both views, and feature values at them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from lssl.losses import DenseInfoNCE, NegativeCosine
from lssl.networks.feature_geometry import Tap
from lssl.views import geometry as geo
from lssl.views.points import at_points, corresponding_points
from lssl.views.sampler import View, ViewSampler

SIZE = (16, 12, 8)
TAP = Tap("", 3, (4, 2, 1), (1.5, 0.5, 0.0))
LATTICE = (4, 6, 8)


def pair(make_batch, pairs: int = 3, seed: int = 0, **settings) -> tuple[View, View]:
    batch = make_batch(pairs, (40, 36, 32), image="frame")
    settings = {"rotation": 10.0, "overlap": 0.4, **settings}
    return ViewSampler(SIZE, transforms=[], **settings)(batch, torch.Generator().manual_seed(seed))


def seen_by_both(first: View, second: View, b: int) -> dict[tuple, torch.Tensor]:
    """Lattice index → place in mm, for every feature of view 1 that view 2 shows: one at a time."""
    found = {}
    one, two = first.affine[b], torch.linalg.inv(second.affine[b])
    for index in itertools.product(*map(range, LATTICE)):
        centre = torch.tensor(
            [s * i + o for s, i, o in zip(TAP.stride, index, TAP.offset, strict=True)] + [1.0]
        ).double()
        place = one @ centre
        other = (two @ place)[:3].tolist()
        feature = [(x - o) / s for x, s, o in zip(other, TAP.stride, TAP.offset, strict=True)]
        if all(0 <= f <= n - 1 for f, n in zip(feature, LATTICE, strict=True)):
            found[index] = place[:3]
    return found


def rounded(places: torch.Tensor) -> set[tuple]:
    return {tuple(round(x, 6) for x in place) for place in places.tolist()}


def test_points_are_those_of_the_lattice_that_both_views_show(make_batch, generator):
    first, second = pair(make_batch)
    places, weight = corresponding_points(first, second, TAP, 10_000, generator)
    assert places.shape == (3, 4 * 6 * 8, 3)  # as many as the lattice has; repeated where fewer are seen
    assert weight.tolist() == [1, 1, 1]
    for b in range(3):
        expected = seen_by_both(first, second, b)
        assert 0 < len(expected) < 4 * 6 * 8
        assert rounded(places[b]) == rounded(torch.stack(list(expected.values())))


def test_points_are_drawn_without_replacement_and_change_with_the_draw(make_batch, generator):
    first, second = pair(make_batch)
    draws = [corresponding_points(first, second, TAP, 20, generator)[0] for _ in range(2)]
    assert draws[0].shape == (3, 20, 3)
    for b in range(3):
        everything = rounded(torch.stack(list(seen_by_both(first, second, b).values())))
        one, two = (rounded(draw[b]) for draw in draws)
        assert len(one) == len(two) == 20
        assert one < everything
        assert one != two


def test_points_are_drawn_evenly(make_batch, generator):
    first, second = pair(make_batch, 1)
    everything = seen_by_both(first, second, 0)
    counts = dict.fromkeys(rounded(torch.stack(list(everything.values()))), 0)
    for _ in range(200):
        for place in rounded(corresponding_points(first, second, TAP, 8, generator)[0][0]):
            counts[place] += 1
    expected = 200 * 8 / len(counts)
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 1.5 * len(counts)  # χ², mean len(counts)


def test_foreground_points_are_preferred_where_there_are_any(make_batch, generator):
    first, second = pair(make_batch, 2)
    middle = torch.stack(list(seen_by_both(first, second, 0).values()))[:, 0].median()
    for view in (first, second):  # one half-space of the frame is foreground, in sample 0 only
        own = geo.transform(view.affine, geo.lattice(SIZE))
        view.foreground = torch.zeros_like(view.foreground)
        view.foreground[0] = (own[0, :, 0] > middle).float().view(1, *SIZE)
    found, weight = corresponding_points(first, second, TAP, 30, generator, foreground=True)
    assert weight.tolist() == [1, 1]
    assert first.contains(found, foreground=True)[0].all()
    assert second.contains(found, foreground=True)[0].all()
    assert len(rounded(found[1])) == 30  # no foreground at all: anywhere


def test_foreground_is_that_of_each_visit_where_its_own_affine_puts_it(make_batch, generator):
    """Two visits on grids of their own, each with a scattered mask: every point lies in both, voxel by voxel."""
    batch = make_batch(2, (40, 36, 32), image="frame", affine="oblique")
    assert not torch.equal(batch.affines[:, 0], batch.affines[:, 1])
    batch.foreground[...] = torch.rand(batch.foreground.shape, generator=generator) < 0.5
    first, second = ViewSampler(SIZE, transforms=[], rotation=10.0, overlap=0.4)(batch, generator)
    places, weight = corresponding_points(first, second, TAP, 20, generator, foreground=True)
    assert weight.tolist() == [1, 1]
    for visit, b in itertools.product(range(2), range(2)):
        voxel = (
            geo.transform(torch.linalg.inv(batch.affines[b, visit])[None], places[b][None]).round().long().view(-1, 3)
        )
        assert batch.foreground[b, visit].squeeze(0)[tuple(voxel.T)].all()


@pytest.mark.parametrize("visit", [0, 1])
@pytest.mark.parametrize("extent", [(15, 36, 32), (40, 12, 32)])
def test_points_beyond_the_data_of_either_visit_are_not_drawn(make_batch, generator, extent: tuple, visit: int):
    batch = make_batch(2, (40, 36, 32), image="frame", affine="same")
    batch.foreground[...] = False
    batch.foreground[:, :, 6:12, 6:9] = True  # so that both views reach the end of the data
    batch.extent[:, visit] = torch.tensor(extent)
    sampler = ViewSampler(SIZE, transforms=[], affine_probability=0.0, overlap=0.4)
    first, second = sampler(batch, generator)
    places, weight = corresponding_points(first, second, TAP, 50, generator)
    assert weight.any()
    index = geo.transform(torch.linalg.inv(batch.affines[:, 0]), places)[weight > 0]
    assert (index - torch.tensor(extent)).max() <= -1 + 1e-9
    assert index.min() >= -1e-9


@pytest.mark.parametrize("stride", [(1, 1, 1), (4, 2, 1)])
def test_features_at_points_are_those_of_the_place_in_either_view(make_batch, generator, stride: tuple):
    """Images hold their own places in mm, features their means: both views read the drawn place."""
    first, second = pair(make_batch, rotation=25.0, zoom=(0.8, 1.3), flip=(0.5, 0.5, 0.5), flip_together=False)
    tap = Tap("", 3, stride, tuple((s - 1) / 2 for s in stride))
    places, weight = corresponding_points(first, second, tap, 40, generator)
    for view in (first, second):
        inner = geo.contains(geo.transform(torch.linalg.inv(view.source_affine), places), (40, 36, 32), 5.0)
        assert inner.float().mean() > 0.2
        found = at_points(F.avg_pool3d(view.image, stride), view, tap, places)
        assert found.dtype == torch.float32
        assert (found - places)[inner & (weight > 0)[:, None]].abs().max() < 2e-3


def test_a_sample_without_common_points_weighs_nothing_and_gets_no_gradient(make_batch, generator):
    first, second = pair(make_batch)
    second.affine[1, 0, 3] += 1000.0
    second.source_affine[1, 0, 3] += 1000.0
    places, weight = corresponding_points(first, second, TAP, 12, generator)
    assert weight.tolist() == [1, 0, 1]
    features = [F.avg_pool3d(torch.randn(3, 5, *SIZE), TAP.stride).requires_grad_() for _ in range(2)]
    z1, z2 = (at_points(f, view, TAP, places) for f, view in zip(features, (first, second), strict=True))
    for loss in (NegativeCosine()(z1, z2.detach(), z2, z1.detach(), weight), DenseInfoNCE()(z1, z2, places, weight)):
        assert loss.isfinite()
        gradients = torch.autograd.grad(loss, features, retain_graph=True)
        for gradient in gradients:
            assert gradient.isfinite().all()
            assert gradient[1].abs().sum() == 0
            assert (gradient[[0, 2]].flatten(1).abs().sum(1) > 0).all()


def test_no_common_point_at_all_gives_zero_and_no_gradient(make_batch, generator):
    first, second = pair(make_batch)
    second.affine[:, 0, 3] += 1000.0
    places, weight = corresponding_points(first, second, TAP, 12, generator)
    z1, z2 = (torch.randn(3, 12, 5, requires_grad=True) for _ in range(2))
    for loss in (NegativeCosine()(z1, z2, z2, z1, weight), DenseInfoNCE()(z1, z2, places, weight)):
        assert loss.item() == 0
        assert all(g.abs().sum() == 0 for g in torch.autograd.grad(loss, (z1, z2)))
