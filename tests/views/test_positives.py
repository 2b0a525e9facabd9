"""Which visits the two views of a pair show: one each, one of them twice, or a mix."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from lssl.data.batch import PairBatch
from lssl.utils.errors import InputError
from lssl.views.sampler import View, ViewSampler

SOURCE = (16, 14, 12)


@pytest.fixture
def batch(make_batch) -> PairBatch:
    batch = make_batch(200, SOURCE, labels=True)
    batch.ages = torch.arange(400.0).view(200, 2)
    batch.extent[:, 1] -= 1
    batch.foreground[:, 1, :2] = False
    return batch


def draw(batch: PairBatch, seed: int = 0, **settings) -> tuple[View, View]:
    return ViewSampler((8, 8, 6), **{"transforms": [], **settings})(batch, torch.Generator().manual_seed(seed))


def visit_of(view: View, batch: PairBatch) -> list[int]:
    """Which visit each view shows, by all that it says of its source; and whether the image agrees."""
    found = []
    for b in range(len(batch)):
        visit = int(view.age[b] - 2 * b)
        assert view.age[b] == batch.ages[b, visit]
        assert torch.equal(view.source_affine[b], batch.affines[b, visit])
        assert torch.equal(view.source_extent[b], batch.extent[b, visit])
        assert torch.equal(view.source_foreground[b], batch.foreground[b, visit])
        assert torch.equal(view.source_label[b], batch.labels[b, visit])
        found.append(visit)
    return found


def test_views_of_one_visit_show_either(batch):
    first, second = draw(batch, same_visit=1.0)
    shown = visit_of(first, batch)
    assert shown == visit_of(second, batch)
    assert 70 < sum(shown) < 130  # of 200; five standard deviations are 35
    assert torch.equal(first.age, second.age)
    assert not torch.equal(first.affine, second.affine)


def test_images_are_of_the_visit_that_was_chosen(make_batch):
    """Every voxel of visit v of pair b is 10 b + v + 1."""
    batch = make_batch(20, SOURCE, affine="same")
    batch.images = (10.0 * torch.arange(20)[:, None] + torch.arange(2) + 1)[..., None, None, None, None].expand(
        20, 2, 1, *SOURCE
    )
    batch.ages = torch.arange(40.0).view(20, 2)
    for view in draw(batch, same_visit=0.5, affine_probability=0.0):
        visit = view.age - 2 * torch.arange(20)
        torch.testing.assert_close(view.image.amax((1, 2, 3, 4)), 10.0 * torch.arange(20) + visit + 1)


@pytest.mark.parametrize("geometry", ["independent", "shared"])
def test_never_is_exactly_as_before(batch, monkeypatch, geometry: str):
    """Not a draw is spent on choosing visits that are not chosen."""
    settings = {"geometry": geometry, "transforms": None}
    never = draw(batch, same_visit=0.0, **settings)
    assert [visit_of(view, batch) for view in never] == [[0] * 200, [1] * 200]
    default = draw(batch, **settings)
    monkeypatch.setattr(ViewSampler, "_choose_visits", lambda self, batch, generator: batch)
    for views in (default, draw(batch, same_visit=0.7, **settings)):
        for one, other in zip(never, views, strict=True):
            assert torch.equal(one.image, other.image)
            assert torch.equal(one.affine, other.affine)


def test_half_the_pairs_are_of_one_visit(batch):
    shown = [visit_of(view, batch) for view in draw(batch, same_visit=0.5)]
    kinds = list(zip(*shown, strict=True))
    counts = {kind: kinds.count(kind) for kind in itertools.product((0, 1), repeat=2)}
    assert counts[1, 0] == 0  # two visits stay in time order
    assert 65 < counts[0, 1] < 135
    assert min(counts[0, 0], counts[1, 1]) > 25


def test_the_share_follows_the_probability(batch):
    for probability in (0.1, 0.9):
        first, second = draw(batch, same_visit=probability)
        assert (first.age == second.age).double().mean().item() == pytest.approx(probability, abs=0.1)


def test_one_seed_gives_one_choice(batch):
    once, again, other = (draw(batch, seed, same_visit=0.5) for seed in (3, 3, 4))
    for a, b, c in zip(once, again, other, strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.age, b.age)
        assert not torch.equal(a.age, c.age)


def test_the_batch_is_left_as_it_was(batch):
    held = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    before = {name: value.clone() for name, value in held.items() if value is not None}
    draw(batch, same_visit=1.0)
    assert all(torch.equal(getattr(batch, name), value) for name, value in before.items())


def test_identical_visits_are_identical_views_if_all_is_shared(make_batch):
    batch = make_batch(6, SOURCE)
    settings = {"geometry": "shared", "intensity": "shared", "transforms": None}
    one, two = draw(batch, same_visit=1.0, **settings)
    assert torch.equal(one.image, two.image)
    assert torch.equal(one.affine, two.affine)
    one, two = draw(batch, same_visit=0.0, **settings)
    assert not torch.equal(one.image, two.image)


def test_centred_views_show_both_visits_all_the_same(batch):
    first, second = ViewSampler((8, 8, 6), same_visit=1.0).centred(batch)
    assert visit_of(first, batch) == [0] * 200
    assert visit_of(second, batch) == [1] * 200


@pytest.mark.parametrize("labels", [True, False])
def test_visits_chooses_in_every_field(make_batch, labels: bool):
    batch = make_batch(4, (3, 4, 5), labels=labels)
    batch.foreground = torch.rand(batch.foreground.shape) > 0.5
    batch.extent = torch.randint(1, 4, batch.extent.shape)
    batch.ages = torch.rand(4, 2)
    index = torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0]])
    chosen = batch.visits(index)
    assert (chosen.labels is None) != labels
    assert torch.equal(chosen.subject, batch.subject)
    for name in ("images", "affines", "extent", "foreground", "ages", "session", *(["labels"] if labels else [])):
        old, new = getattr(batch, name), getattr(chosen, name)
        assert new.shape == old.shape
        assert new.dtype == old.dtype
        for b, place in itertools.product(range(4), range(2)):
            assert torch.equal(new[b, place], old[b, index[b, place]]), name


@pytest.mark.parametrize("wrong", [-0.1, 1.01, 2, float("nan")])
def test_what_is_no_probability_is_refused(wrong: float):
    with pytest.raises(InputError, match=r"same_visit is a probability, not"):
        ViewSampler(same_visit=wrong)


@pytest.mark.parametrize("right", [0, 1, 0.0, 1.0])
def test_the_ends_are_probabilities(right: float):
    assert ViewSampler(same_visit=right).same_visit == right
