"""Views of series: K views of K visits, each placed relative to the first, and any two of them correspond."""

from __future__ import annotations

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from some_views import BIG, SIZE, index_map, views
from test_views import shared_part

from lssl.data.batch import PairBatch
from lssl.networks.feature_geometry import Tap
from lssl.utils.errors import InputError
from lssl.views import geometry as geo
from lssl.views.points import at_points, corresponding_points
from lssl.views.sampler import View, ViewSampler


def series(batch: PairBatch, seed: int = 0, **settings) -> tuple[View, ...]:
    sampler, generator = views(seed, **settings)
    return sampler.series(batch, generator)


@pytest.mark.parametrize("geometry", ["independent", "shared", "aligned"])
def test_of_pairs_they_are_the_views_of_pairs_and_of_series_those_of_its_ends(make_batch, geometry):
    batch = make_batch(3, BIG, visits=4)
    sampler, generator = views(geometry=geometry, transforms=None, same_visit=0.3)
    pair = batch.visits(torch.tensor([[0, 3]] * 3))
    wanted = sampler.series(pair, generator)
    for source, call in ((pair, sampler), (batch, sampler)):
        for found, one in zip(call(source, generator.manual_seed(0)), wanted, strict=True):
            assert torch.equal(found.image, one.image)
            assert torch.equal(found.affine, one.affine)
    for found, one in zip(sampler.centred(batch), sampler.centred(pair), strict=True):
        assert torch.equal(found.image, one.image)
        assert torch.equal(found.time, one.time)


@pytest.mark.parametrize("geometry", ["independent", "shared", "aligned"])
def test_each_view_shows_its_visit_where_its_affine_says(make_batch, geometry):
    """The images hold the place of each voxel, and every visit has an affine of its own."""
    batch = make_batch(2, BIG, image="frame", visits=3)
    for visit, view in enumerate(found := series(batch, geometry=geometry)):
        inside = geo.contains(
            geo.transform(index_map(view), geo.lattice(SIZE).expand(2, -1, -1)), torch.tensor(BIG)[None, None]
        )
        places = geo.transform(view.affine, geo.lattice(SIZE).expand(2, -1, -1))
        torch.testing.assert_close(
            view.image.flatten(2).transpose(1, 2)[inside].double(), places[inside], atol=1e-3, rtol=0
        )
        assert inside.float().mean() > 0.5
        assert torch.equal(view.time, batch.times[:, visit])
        assert torch.equal(view.source_affine, batch.affines[:, visit])
        np.testing.assert_array_equal(view.host.source_affine, batch.affines[:, visit])
    assert len(found) == 3


@pytest.mark.parametrize("overlap", [0.3, 0.7])
def test_each_other_view_overlaps_the_first_and_shares_its_mirror(make_batch, overlap):
    first, *others = series(make_batch(8, BIG, visits=4), overlap=overlap, flip=(0.5, 0.5, 0.5))
    for other in others:
        part = shared_part(first, other)
        assert part.min() > overlap - 0.005
        turned = torch.linalg.inv(first.affine) @ other.affine
        assert (turned.diagonal(dim1=1, dim2=2)[:, :3] > 0).all()
    assert not any(torch.allclose(one.affine, two.affine) for one, two in product(others, others) if one is not two)


def test_shared_geometry_is_one_map_and_aligned_geometry_one_box(make_batch):
    batch = make_batch(2, BIG, visits=3)
    first, *others = series(batch, geometry="shared")
    assert all(torch.equal(index_map(first).round(decimals=9), index_map(other).round(decimals=9)) for other in others)
    first, *others = series(batch, geometry="aligned")
    assert all(torch.allclose(first.affine, other.affine, atol=1e-9) for other in others)


def test_shared_geometry_shows_one_box_where_voxel_sizes_differ(make_batch):
    """Of three visits, the last one alone has larger voxels."""
    batch = make_batch(2, BIG, affine="same", visits=3)
    batch.affines[:, 2] = batch.affines[:, 2] @ torch.diag(torch.tensor([1.3, 1.3, 1.3, 1.0], dtype=torch.float64))
    sampler, generator = views(geometry="shared", spacing=1.0)
    first, same, larger = sampler.series(batch, generator)
    assert torch.equal(index_map(first).round(decimals=9), index_map(same).round(decimals=9))
    torch.testing.assert_close(larger.affine, first.affine)


@pytest.mark.parametrize("geometry", ["independent", "aligned"])
def test_each_view_has_the_working_spacing_whatever_its_visit_has(make_batch, geometry):
    batch = make_batch(3, BIG, visits=3)
    batch.affines[:, 2] = batch.affines[:, 2] @ torch.diag(torch.tensor([1.3, 1.3, 1.3, 1.0], dtype=torch.float64))
    sampler, generator = views(geometry=geometry, spacing=1.2, affine_probability=0.0)
    for view in sampler.series(batch, generator):
        torch.testing.assert_close(geo.spacing(view.affine), torch.full((3, 3), 1.2, dtype=torch.float64))


@pytest.mark.parametrize("two", [(0, 2), (2, 1)])
def test_any_two_views_correspond(make_batch, generator, two):
    """A point of one view lies at the same place in the other: by its own matrices and images alone."""
    drawn = series(make_batch(3, BIG, image="frame", visits=3), overlap=0.6, zoom=(0.8, 1.25))
    first, second = (drawn[visit] for visit in two)
    tap = Tap("", 3, (1, 1, 1), (0.0, 0.0, 0.0))
    places, weight = corresponding_points(first, second, tap, 64, generator)
    assert weight.tolist() == [1, 1, 1]
    for b in range(3):
        for view in (first, second):
            index = (np.linalg.inv(view.affine[b].numpy()) @ np.vstack([places[b].T.numpy(), np.ones(64)]))[:3]
            inside = index.clip(0, np.array(SIZE)[:, None] - 1)
            np.testing.assert_allclose(index, inside, atol=1e-6)
            read = [map_coordinates(channel, inside, order=1) for channel in view.image[b].numpy()]
            np.testing.assert_allclose(np.stack(read, 1), places[b].numpy(), atol=2e-3)
    torch.testing.assert_close(at_points(view.image, view, tap, places).double(), places, atol=2e-3, rtol=0)


def test_all_views_are_made_by_one_resampling(make_batch, monkeypatch):
    calls, resample = [], geo.resample_parts
    monkeypatch.setattr(geo, "resample_parts", lambda *args: calls.append(1) or resample(*args))
    series(make_batch(2, BIG, visits=4), transforms=None)
    assert len(calls) == 1


def test_every_randomness_comes_from_the_generator(make_batch):
    batch = make_batch(2, BIG, visits=3)
    one, again, other = (series(batch, seed, transforms=None) for seed in (4, 4, 5))
    for a, b, c in zip(one, again, other, strict=True):
        assert torch.equal(a.image, b.image)
        assert not torch.equal(a.affine, c.affine)


def test_contrasts_of_series(make_batch):
    batch = make_batch(40, BIG, image="frame", visits=3)
    present = torch.ones(40, 3, 3, dtype=torch.bool)
    present[:, 2, 1] = False
    batch = dataclasses.replace(batch, present=present)
    shown = torch.stack([view.shown for view in series(batch, contrasts="mix")], 1)
    assert not (shown & ~present).any()
    assert shown.any(2).all()
    assert (shown[:, 0] != shown[:, 1]).any()
    with pytest.raises(InputError, match="contrasts is cross, which divides channels between two views"):
        series(batch, contrasts="cross")


def test_moving_tissue_is_known_between_two_visits_alone(make_batch):
    with pytest.raises(InputError, match="the batch does not tell how tissue moves"):
        ViewSampler(SIZE, correspondence="field").series(make_batch(2, BIG, visits=3), torch.Generator())
