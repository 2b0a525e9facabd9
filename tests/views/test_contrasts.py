"""Which contrasts views show: what a visit lacks stays 0, and what a view hides is hidden everywhere."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from some_views import draw, views

from lssl.data.batch import PairBatch, Visit, collate
from lssl.data.loading import PairDataset
from lssl.utils.errors import InputError
from lssl.views.contrasts import check_contrasts, draw_shown
from lssl.views.intensity import BiasField, Blur, Brightness, Contrast, Gamma, LowResolution, Noise

EVERY = [Blur(1), LowResolution(1), Noise(1), BiasField(1), Brightness(1), Contrast(1), Gamma(1)]


def sets(channels: int) -> list[list[bool]]:
    """All choices of at least one channel."""
    return [list(chosen) for chosen in itertools.product([False, True], repeat=channels) if any(chosen)]


def two_contrasts(make_batch, present: list | None = None, pairs: int = 4) -> PairBatch:
    """Pairs of two bright channels; those that are not present are 0."""
    batch = make_batch(pairs)
    batch.images = torch.rand(pairs, 2, 2, *batch.size, generator=torch.Generator().manual_seed(1)) + 0.5
    if present is not None:
        batch.present = torch.tensor(present)
        batch.images = batch.images * batch.present[..., None, None, None]
    return batch


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_every_combination_of_visits_gives_views_that_show_something(channels: int):
    """Of all visits; across, no channel is in both views unless there is but one, and none is lost."""
    cases = np.array(list(itertools.product(sets(channels), repeat=2)) * 20)
    draws = np.random.default_rng(0)
    for contrasts in ("same", "cross", "mix"):
        shown = draw_shown(cases, contrasts, draws)
        assert shown.any(-1).all()
        assert not (shown & ~cases).any()
        if contrasts == "same":
            assert (shown == cases).all()
        if contrasts == "cross":
            single = (cases[:, 0] == cases[:, 1]).all(-1) & (cases[:, 0].sum(-1) == 1)
            assert not shown[~single].all(1).any()
            assert (shown.any(1) == cases.any(1)).all()


@pytest.mark.parametrize(("contrasts", "sizes"), [("cross", [0.5, 0.5, 0]), ("mix", [1 / 3, 1 / 3, 1 / 3])])
def test_all_choices_are_drawn(contrasts, sizes: list[float]):
    """Across three channels, one view has one and the other two; mixed, every number is equally frequent."""
    shown = draw_shown(np.ones((3000, 2, 3), bool), contrasts, np.random.default_rng(0))
    for view in range(2):
        assert len(np.unique(shown[:, view], axis=0)) == (6 if contrasts == "cross" else 7)
        number = np.bincount(shown[:, view].sum(-1), minlength=4)[1:] / 3000
        np.testing.assert_allclose(number, sizes, atol=0.04)
        np.testing.assert_allclose(shown[:, view].mean(0), shown[:, view].mean(), atol=0.04)
    assert (shown[:, 0] != shown[:, 1]).any()


@pytest.mark.parametrize("intensity", ["shared", "independent"])
@pytest.mark.parametrize("geometry", ["shared", "independent"])
def test_a_missing_channel_stays_empty_whatever_is_done_to_intensities(make_batch, geometry: str, intensity: str):
    """The other one is to the bit what it is if nobody says that a channel is missing."""
    present = [[[True, False], [True, True]], [[False, True], [True, False]]] * 2
    batch = two_contrasts(make_batch, present)
    options = {"geometry": geometry, "intensity": intensity, "transforms": EVERY}
    told = draw(batch, **options)
    untold = draw(dataclasses.replace(batch, present=None), **options)
    for visit, (view, plain) in enumerate(zip(told, untold, strict=True)):
        assert torch.equal(view.shown, batch.present[:, visit])
        assert plain.shown is None
        for seen, other in ((view.image, plain.image), (view.clean, plain.clean)):
            assert torch.equal(seen[view.shown], other[view.shown])
            assert (seen[view.shown].flatten(1) != 0).any(1).all()
            assert not seen[~view.shown].any()
    assert plain.image[~view.shown].any()  # noise would fill it


def test_what_is_shown_follows_the_visits(make_batch):
    """Exchanged visits, chosen pairs, and a view of one visit twice."""
    batch = two_contrasts(make_batch, [[[True, False], [True, True]]] * 4)
    for index, wanted in (([1, 0], [[True, True], [True, False]]), ([0, 0], [[True, False]] * 2)):
        moved = batch.visits(torch.tensor([index] * 4))
        assert moved.present[2].tolist() == moved.host.present[2].tolist() == wanted
        assert [view.shown[1].tolist() for view in draw(moved)] == wanted
    assert batch.rows(slice(1, 3)).present.shape == (2, 2, 2)
    first, second = draw(batch, same_visit=1.0)
    assert torch.equal(first.shown, second.shown)
    assert not first.image[~first.shown].any()


def test_views_across_show_the_contrasts_of_one_visit_apart(make_batch):
    """Also of a batch in which all visits have all; drawn from the generator, and not in evaluation."""
    batch = two_contrasts(make_batch, pairs=12)
    first, second = draw(batch, contrasts="cross", transforms=EVERY)
    assert (first.shown ^ second.shown).all()
    assert first.shown[:, 0].any()
    assert first.shown[:, 1].any()
    for view in (first, second):
        assert not view.image[~view.shown].any()
        assert not view.clean[~view.shown].any()
    again, _ = draw(batch, contrasts="cross", transforms=EVERY)
    other, _ = draw(batch, 1, contrasts="cross", transforms=EVERY)
    assert torch.equal(again.image, first.image)
    assert not torch.equal(other.shown, first.shown)
    plain, _ = draw(batch, transforms=EVERY)
    assert torch.equal(plain.image[first.shown], first.image[first.shown])  # geometry and intensities are the same
    for view in views(contrasts="cross")[0].centred(batch):
        assert view.shown is None


def test_a_batch_knows_what_is_missing_if_one_visit_says_so():
    def visit(present) -> Visit:
        image, affine = torch.ones(2, 4, 4, 4), torch.eye(4, dtype=torch.float64)
        return Visit(image, affine, torch.ones(4, 4, 4, dtype=torch.bool), present=present)

    full, lacking = visit(None), visit(torch.tensor([False, True]))
    assert collate([(full, full)]).present is None
    batch = collate([(full, lacking), (full, full)])
    assert batch.present.tolist() == [[[True, True], [False, True]], [[True, True], [True, True]]]
    assert batch.to("cpu").host.present.tolist() == batch.present.tolist()


def test_pictures_show_the_first_channel_that_is_there(make_batch):
    batch = two_contrasts(make_batch, [[[False, True], [True, True]]] * 4)
    assert torch.equal(batch.picture(0, 0), batch.images[0, 0, 1])
    assert torch.equal(batch.picture(0, 1), batch.images[0, 1, 0])
    assert torch.equal(two_contrasts(make_batch).picture(3, 1), two_contrasts(make_batch).images[3, 1, 0])
    for view, channel in zip(draw(batch), (1, 0), strict=True):
        np.testing.assert_array_equal(view.picture(), view.image[0, channel].numpy())


def test_a_transform_on_the_cpu_cannot_fill_a_missing_channel():
    visit = Visit(
        torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 4, 4, 4),
        torch.eye(4, dtype=torch.float64),
        torch.ones(4, 4, 4, dtype=torch.bool),
        present=torch.tensor([False, True]),
    )

    def noise(one: Visit) -> Visit:
        return dataclasses.replace(one, image=one.image + 5)

    unknown = np.full(1, np.nan)
    dataset = PairDataset(lambda *_: (visit, visit), np.zeros((1, 2), int), np.zeros(1, int), unknown, unknown)
    dataset.transform = noise
    for found in dataset[0]:
        assert not found.image[0].any()
        assert (found.image[1] == 6).all()


def test_a_choice_that_is_none_is_refused():
    with pytest.raises(InputError, match="contrasts is same, cross or mix, not 'both'"):
        views(contrasts="both")
    with pytest.raises(InputError, match=r"contrasts is mix, and the images have 1 channel \(T1w\)"):
        check_contrasts("mix", ["T1w"])
    check_contrasts("same", ["T1w"])
