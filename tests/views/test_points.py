"""Corresponding points: on view 1's lattice, seen by both views, and feature values at them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lssl.losses import DenseInfoNCE, NegativeCosine
from lssl.networks.feature_geometry import Tap
from lssl.utils.random import seeded
from lssl.views import geometry as geo
from lssl.views.draws import Candidates
from lssl.views.points import at_points, corresponding_points, plan_points
from lssl.views.sampler import View, ViewSampler
from lssl.views.view import Placement

SIZE = (16, 12, 8)
TAP = Tap("", 3, (4, 2, 1), (1.5, 0.5, 0.0))
LATTICE = (4, 6, 8)


def pair(make_batch, pairs: int = 3, seed: int = 1, **settings) -> tuple[View, View]:
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


# --- several pairs ----------------------------------------------------------------------------------------------------

ROOMY = Tap("", 3, (1, 1, 1), (0.0, 0.0, 0.0))  # 1536 features, more than candidates of 20 points


def alike(make_batch, pairs: int) -> Placement:
    """The same view of the same place, for every pair: whatever differs between pairs was drawn."""
    view = pair(make_batch, 1, foreground=False)[0].host
    arrays = {key: value for key, value in vars(view).items() if isinstance(value, np.ndarray)}
    return Placement(**{key: np.repeat(value, pairs, 0) for key, value in arrays.items()}, size=view.size)


@pytest.mark.parametrize("tap", [TAP, ROOMY])
def test_no_draw_is_shared_between_pairs(make_batch, tap: Tap):
    """Neither places nor the steps from one to the next: an order that pairs share would show in these."""
    view, number = alike(make_batch, 2), math.prod(n // s for n, s in zip(SIZE, tap.stride, strict=True))
    same_place, same_step, rounds = 0.0, 0.0, 60
    for seed in range(rounds):
        index = plan_points(view, view, [tap], 20, seeded(seed)).index[0]
        assert (np.sort(index)[:, 1:] > np.sort(index)[:, :-1]).all()  # none twice
        same_place += (index[0] == index[1]).mean() / rounds
        steps = np.diff(index) % number
        same_step += (abs(steps[0] - steps[1]) <= number // 150).mean() / rounds  # as wide as a stratum is
    assert same_place < 5 / number + 0.01
    assert same_step < 0.05


def test_order_place_and_shift_are_each_pairs_own():
    drawn = Candidates(np.array([1536, 192]), 3, 20, np.random.default_rng(0))
    for values in (drawn.order, drawn.within, drawn.shift[..., 0].T):
        assert len(np.unique(values, axis=0)) == 3


def test_every_feature_is_as_likely_for_every_pair_and_tap(make_batch):
    view, counts = alike(make_batch, 3), np.zeros((2, 3, 192))
    taps = [TAP, Tap("", 3, (4, 3, 1), (1.5, 1.0, 0.0))]  # lattices of 192 and 128 features
    for seed in range(400):
        index = plan_points(view, view, taps, 12, seeded(seed)).index
        np.add.at(counts, (*np.indices(index.shape)[:2], index), 1)
    for tap, number in enumerate((192, 128)):
        expected = 400 * 12 / number
        found = ((counts[tap, :, :number] - expected) ** 2 / expected).sum(-1)
        assert (found < number + 4 * (2 * number) ** 0.5).all()  # χ² of about as many degrees of freedom
        assert counts[tap, :, number:].sum() == 0


@pytest.mark.parametrize("foreground", [False, True])
def test_both_ways_are_two_plans_from_the_same_draws(make_batch, foreground: bool):
    batch = make_batch(3, (40, 36, 32), image="frame")
    batch.foreground[..., :14, :, :] = False
    first, second = (
        view.host for view in ViewSampler(SIZE, transforms=[], overlap=0.4)(batch, torch.Generator().manual_seed(1))
    )
    taps = [TAP, ROOMY]
    both = plan_points(first, second, taps, 25, seeded(3), foreground, both_ways=True)
    alone = [plan_points(*views, taps, 25, seeded(3), foreground) for views in ((first, second), (second, first))]
    for name in ("mm", "weight", "index"):
        np.testing.assert_allclose(
            getattr(both, name), np.concatenate([getattr(one, name) for one in alone]), atol=1e-9
        )


def test_points_of_a_pair_do_not_depend_on_what_the_other_pairs_share(make_batch):
    """A pair that needs more candidates than are looked at first must not change the others' points."""
    view = alike(make_batch, 3)
    apart = Placement(**{**vars(view), "affine": view.affine.copy()})
    apart.affine[1:, :3, 3] += view.affine[1:, :3, 0] * np.array([[14.0], [1000.0]])  # pair 1 shares little, 2 nothing
    for seed in range(5):
        found, expected = (plan_points(view, other, [TAP, ROOMY], 20, seeded(seed)) for other in (apart, view))
        np.testing.assert_array_equal(found.index[:, 0], expected.index[:, 0])
        assert found.weight[:, 2].sum() == 0
