"""Matched views: both are centred on the same anatomy, of whom, and what happens where there is no match."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from lssl.correspondence.matched_views import MatchedViews, Matching
from lssl.correspondence.matchers import FrameMatcher, Matcher
from lssl.utils.errors import InputError
from lssl.views import geometry as geo
from lssl.views.sampler import View, ViewSampler

SIZE = (50, 48, 46)
VIEW = 16


class Scored(Matcher):
    """The frame's places, moved by some mm, with given scores ``(B, N)``."""

    def __init__(self, score: Tensor | float = 1.0, move: float = 0.0) -> None:
        super().__init__()
        self.score, self.move, self.seen = score, move, []

    def match(self, points: Tensor, first: View, second: View) -> tuple[Tensor, Tensor]:
        self.seen.append((points, first, second))
        score = self.score if isinstance(self.score, Tensor) else torch.full(points.shape[:2], self.score)
        return points.double() + self.move, score


def matched(matcher: Matcher | None = None, other_subject: float = 0.0, **options) -> MatchedViews:
    settings = {"tries": 5, "accept": 0.7, "min_score": 0.5}
    names = {name: options.pop(name) for name in list(options) if name in settings}
    sampler = ViewSampler(VIEW, **{"transforms": [], "overlap": 1.0, **options})
    return MatchedViews(sampler, Matching(matcher or FrameMatcher(), other_subject, **{**settings, **names}))


def centre(view: View) -> Tensor:
    """``(B, 3)`` mm in the middle of the crop."""
    middle = torch.full((1, 1, 3), (VIEW - 1) / 2, dtype=torch.float64)
    return geo.transform(view.affine, middle)[:, 0]


def whose(view: View, batch) -> list[tuple[int, int]]:
    """Pair and visit of each view's source, by its affine."""
    found = []
    for affine in view.source_affine:
        equal = (batch.affines - affine).abs().amax((2, 3)) < 1e-12
        found.append(tuple(equal.nonzero()[0].tolist()))
    return found


@pytest.fixture(scope="module")
def batch(make_batch):
    """Six pairs whose frames nearly coincide, the first two of one subject; far from the border, matches fit."""
    made = make_batch(6, SIZE)
    foreground = torch.zeros_like(made.foreground)
    foreground[:, :, 15:35, 14:34, 13:33] = True
    draw = torch.Generator().manual_seed(1)
    shift, angle, size = (2 * torch.rand(3, 6, 2, 3, generator=draw, dtype=torch.float64) - 1).unbind(0)
    middle = torch.tensor([24.5, 23.5, 22.5], dtype=torch.float64).expand(6, 2, 3)
    own = geo.translation(2 * shift) @ geo.about(geo.rotation(0.05 * angle) @ geo.scaling(1 + 0.05 * size), middle)
    affines = made.affines[:1, :1] @ own
    return dataclasses.replace(made, affines=affines, foreground=foreground, subject=torch.tensor([0, 0, 1, 2, 3, 4]))


@pytest.mark.parametrize("other_subject", [0.0, 1.0])
def test_centres_show_one_place_through_zoom_rotation_and_mirror(batch, generator, other_subject):
    """Oblique anisotropic sources of different voxel sizes and places: in mm of the shared frame."""
    matcher = Scored(move=0.0)
    query, key, rates = matched(matcher, other_subject, zoom=(0.9, 1.1), rotation=10.0)(batch, generator)
    assert rates["accepted"] + rates["best"] + rates["same_visit"] == pytest.approx(1.0)
    off = (centre(query) - centre(key)).norm(dim=1)
    assert off.max() < 1e-9
    assert not torch.allclose(query.affine, key.affine)


def test_a_match_elsewhere_is_followed(batch, generator):
    query, key, rates = matched(Scored(move=1.5))(batch, generator)
    assert rates["accepted"] == 1
    torch.testing.assert_close(centre(key), centre(query) + 1.5)


def test_the_overlap_shifts_the_key_by_no_more(batch):
    view, shifts = matched(overlap=0.67, affine_probability=0.0), []
    for seed in range(30):
        query, key, _ = view(batch, torch.Generator().manual_seed(seed))
        off = geo.transform(geo.inverse(key.affine), centre(query)[:, None])[:, 0] - (VIEW - 1) / 2
        shifts.append(off)
    shifts = torch.cat(shifts).abs()
    reach = VIEW * (1 - 0.67 ** (1 / 3))
    assert shifts.max() <= reach + 1e-6  # both places are exact, whatever the sources' grids
    assert shifts.max() > 0.8 * reach


def test_keys_are_of_the_other_visit_or_of_another_subject(batch):
    """Queries are either visit; a pair of the same subject is no stranger."""
    for share in (0.0, 1.0):
        queries, keys = [], []
        for seed in range(20):
            query, key, rates = matched(Scored(), share)(batch, torch.Generator().manual_seed(seed))
            queries += whose(query, batch)
            keys += whose(key, batch)
            assert rates["other_subject"] == share
        assert {visit for _, visit in queries} == {0, 1}
        for number, ((pair, visit), (other, later)) in enumerate(zip(queries, keys, strict=True)):
            assert pair == number % 6
            if share:
                assert batch.subject[pair] != batch.subject[other]
            else:
                assert (other, later) == (pair, 1 - visit)
        if share:
            assert {visit for _, visit in keys} == {0, 1}
            assert len({key for (pair, _), (key, _) in zip(queries, keys, strict=True) if pair == 2}) == 5


def test_in_a_batch_of_one_subject_the_other_visit_takes_the_strangers_place(batch, generator):
    alone = dataclasses.replace(batch, subject=torch.zeros(6, dtype=torch.long))
    query, key, rates = matched(Scored(), 1.0)(alone, generator)
    assert rates["other_subject"] == 0
    assert [(pair, 1 - visit) for pair, visit in whose(query, alone)] == whose(key, alone)


def test_same_visits_as_often_as_the_views_ask(batch):
    query, key, _ = matched(Scored(), same_visit=1.0)(batch, torch.Generator().manual_seed(0))
    assert whose(query, batch) == whose(key, batch)


def test_images_are_those_of_the_sources(make_batch, generator):
    """The image holds its own coordinates: what both crops show at their middle is the same place."""
    batch = make_batch(4, SIZE, image="frame")
    for share in (0.0, 1.0):
        query, key, _ = matched(Scored(), share, affine_probability=0.0, flip=(0, 0, 0))(batch, generator)
        for view in (query, key):
            middle = view.clean[
                :, :, VIEW // 2 - 1 : VIEW // 2 + 1, VIEW // 2 - 1 : VIEW // 2 + 1, VIEW // 2 - 1 : VIEW // 2 + 1
            ]
            torch.testing.assert_close(middle.mean((2, 3, 4)).double(), centre(view), atol=1e-3, rtol=0)


@pytest.mark.parametrize("together", [True, False])
def test_zoom_and_rotation_are_drawn_apart_and_mirrors_together_if_asked(batch, together):
    mirrored = []
    for seed in range(5):
        drawn = matched(Scored(), flip_together=together, rotation=10.0, affine_probability=1.0)
        query, key, _ = drawn(batch, torch.Generator().manual_seed(seed))
        one, two = (geo.inverse(view.source_affine) @ view.affine for view in (query, key))
        mirrored += [(a < 0, b < 0) for a, b in zip(one.det().tolist(), two.det().tolist(), strict=True)]
        assert not torch.isclose(geo.spacing(query.affine), geo.spacing(key.affine), rtol=1e-3).all(1).any()
    assert {one for one, _ in mirrored} == {True, False}
    assert all(one == two for one, two in mirrored) == together


# --- the ladder -------------------------------------------------------------------------------------------------------


def test_the_first_good_place_else_the_best_else_the_same_visit(batch, generator):
    score = torch.tensor(
        [
            [0.1, 0.8, 0.9, 0.2, 0.3],  # the first accepted
            [0.1, 0.55, 0.6, 0.2, 0.3],  # the best
            [0.1, 0.2, 0.3, 0.4, 0.45],  # none: the same visit, at its first place
            [0.9, 0.2, 0.3, 0.4, 0.45],
            [0.0, 0.0, 0.0, 0.0, 0.0],
            [0.5, 0.2, 0.3, 0.4, 0.45],
        ]
    )
    matcher = Scored(score)
    query, key, rates = matched(matcher)(batch, generator)
    points = matcher.seen[0][0]
    chosen = torch.stack([points[row, n] for row, n in enumerate((1, 2, 0, 0, 0, 0))])
    torch.testing.assert_close(centre(query), chosen)
    torch.testing.assert_close(centre(key), chosen)
    assert [one == two for one, two in zip(whose(query, batch), whose(key, batch), strict=True)] == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]
    assert rates["accepted"] == pytest.approx(2 / 6)
    assert rates["best"] == pytest.approx(2 / 6)
    assert rates["same_visit"] == pytest.approx(2 / 6)
    assert rates["score"] == pytest.approx((0.8 + 0.6 + 0.9 + 0.5) / 4)


def test_a_match_too_near_the_border_is_none(batch, generator):
    """30 mm away the key's box would leave its source, and be pushed back by more than the overlap allows."""
    query, key, rates = matched(Scored(move=30.0))(batch, generator)
    assert rates["same_visit"] == 1
    assert whose(query, batch) == whose(key, batch)
    torch.testing.assert_close(centre(query), centre(key))


def test_places_lie_on_the_foreground(batch, generator):
    matcher = Scored()
    matched(matcher, tries=3)(batch, generator)
    points, first, _ = matcher.seen[0]
    index = geo.transform(geo.inverse(first.affine), points).round().long()
    rows = torch.arange(6)[:, None]
    hit = first.source_foreground[rows, index[..., 0], index[..., 1], index[..., 2]]
    assert hit.all()


def test_one_seed_draws_once(batch):
    one, two = (matched(other_subject=0.5)(batch, torch.Generator().manual_seed(3)) for _ in range(2))
    for a, b in zip(one[:2], two[:2], strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.affine, b.affine)


def test_settings_that_cannot_be_are_refused():
    for options, message in (
        ({"tries": 0}, "tries"),
        ({"min_score": 0.0}, "min_score"),
        ({"min_score": 0.9}, "min_score"),
        ({"accept": 1.5}, "min_score"),
        ({"other_subject": 1.5}, "probability"),
        ({"geometry": "shared"}, "independent"),
        ({"geometry": "aligned"}, "independent"),
    ):
        with pytest.raises(InputError, match=message):
            matched(**options)
