"""Order of series: its values, what is left out, and an order that three visits tell and two do not."""

from __future__ import annotations

import dataclasses
import math
from itertools import combinations, permutations

import planted
import pytest
import torch
import torch.nn.functional as F

from lssl.data.batch import PairBatch
from lssl.losses import NTXent
from lssl.strategies.trajectory_order import SeriesScores, TrajectoryOrder
from lssl.utils.errors import InputError
from lssl.views.sampler import View

NAN = float("nan")
NARROW = {"width": 32, "depth": 1, "heads": 2, "hidden": 32, "projection": 16}


def make(**options) -> TrajectoryOrder:
    return TrajectoryOrder(planted.backbone(), "deep", **{**NARROW, "views": planted.views(), **options})


def heights_of(series: int, visits: int, draw: torch.Generator, grows: float = 0.5) -> torch.Tensor:
    """``(series, visits)`` that grow in this share of the subjects, shrink in the others, and ever faster.

    Of two visits, either may then be the later one; of three, it is at the end of the longer step.
    """
    way = 2.0 * (torch.rand(series, 1, generator=draw) < grows) - 1
    return torch.randn(series, 1, generator=draw) + 0.3 * way * torch.arange(visits) ** 2


def quickening(series: int, seed: int, visits: int = 3, grows: float = 0.5) -> PairBatch:
    """Images with stripes of such heights along one axis; all else is drawn anew for each visit."""
    draw, side = torch.Generator().manual_seed(seed), planted.SOURCE
    height = 2 + heights_of(series, visits, draw, grows)
    heights = 1 + 0.3 * torch.randn(series, visits, 2, generator=draw)
    images = 0.05 * torch.randn(series, visits, 1, side, side, side, generator=draw)
    wave = (torch.arange(side) * math.pi / 2).cos()
    for axis, values in enumerate((height, heights[..., 0], heights[..., 1])):
        images += values[..., None, None, None, None] * wave.view([side if axis == other else 1 for other in range(3)])
    times = torch.arange(visits) * (1 + torch.rand(series, 1, generator=draw))
    return PairBatch(
        images,
        torch.eye(4, dtype=torch.float64).repeat(series, visits, 1, 1),
        torch.full((series, visits, 3), side),
        torch.ones(series, visits, side, side, side, dtype=torch.bool),
        60 + times,
        times,
        None,
        torch.arange(series) + 1000 * seed,
        torch.arange(series * visits).view(series, visits),
    )


def drawn(strategy: TrajectoryOrder, batch: PairBatch, times: list[list[float]] | None = None) -> tuple[View, ...]:
    """Views of all visits, in time order."""
    batch = batch if times is None else dataclasses.replace(batch, times=torch.tensor(times))
    return strategy.views.series(batch, torch.Generator().manual_seed(1))


def test_terms_by_hand():
    """In float64 from scores and projections; pairs of equal or unknown times are left out, not their series."""
    times = [[0.0, 2.0, 3.0], [3.0, 1.5, 1.5], [1.0, NAN, 0.5], [NAN, NAN, 2.0], [4.0, 4.0, 4.0]]
    strategy, batch = make(norm="layer"), quickening(5, 0)
    views = drawn(strategy, batch, times)
    terms = strategy.series_terms(views, batch)
    pooled = strategy.pool([view.image for view in views])
    scores, losses, right = strategy.head(pooled).tolist(), [], []
    for row, own in enumerate(times):
        known = [(i, j) for i, j in permutations(range(3), 2) if own[j] > own[i]]
        losses += [math.log1p(math.exp(-(scores[row][j] - scores[row][i]))) for i, j in known]
        right.append(all(scores[row][j] > scores[row][i] for i, j in known))
    assert len(losses) == 3 + 2 + 1
    assert terms["order"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    z1, z2 = (strategy.projector(pooled[:, visit]) for visit in (0, 1))
    assert terms["contrast"].item() == pytest.approx(NTXent(0.2)(z1, z2, batch.subject).item(), rel=1e-5)
    assert strategy.logged["skipped"].item() == pytest.approx(1 - 6 / 15)
    assert strategy.logged["sorted"].item() == pytest.approx(sum(right) / 5)


def test_scores_follow_their_visits_and_depend_on_all_of_them():
    strategy, batch = make().eval(), quickening(4, 0)
    images = [view.image for view in drawn(strategy, batch)]
    scores = strategy.scores(images)
    for order in permutations(range(3)):
        torch.testing.assert_close(strategy.scores([images[n] for n in order]), scores[:, list(order)])
    assert (strategy.scores(images[:2]) - scores[:, :2]).abs().min() > 1e-4
    assert strategy.scores(images[:1] * 3).diff(dim=1).abs().max() < 1e-6


@pytest.mark.parametrize("fewest", [2, 3, 9])
def test_a_step_shows_different_visits_in_random_order_and_any_number_of_them(fewest):
    strategy, batch = make(fewest=fewest), quickening(60, 0, visits=4)
    numbers = set()
    for seed in range(12):
        strategy.generator.manual_seed(seed)
        times = torch.stack([view.time for view in strategy.draw_series(batch)], 1)
        numbers.add(times.shape[1])
        place = (times[..., None] == batch.times[:, None]).long().argmax(2)
        assert all(len({*row}) == len(row) for row in place.tolist())
        assert all({*column} == {0, 1, 2, 3} for column in place.T.tolist())
    assert numbers == set(range(min(fewest, 4), 5))
    assert len(strategy.eval().draw_series(batch)) == 4


@pytest.mark.parametrize("visits", [2, 3])
def test_no_pair_with_an_order_gives_zero_with_a_gradient(visits):
    strategy, batch = make(loss_weights={"contrast": 0.0}), quickening(2, 0, visits)
    views = drawn(strategy, batch, [[0.0, NAN, 0.0][:visits], [2.0, 2.0, NAN][:visits]])
    terms = strategy.series_terms(views, batch)
    assert terms["order"].item() == 0
    terms["order"].backward()
    trained = [p for p in strategy.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)


@pytest.mark.parametrize("term", ["order", "contrast"])
@pytest.mark.parametrize("visits", [2, 3])
def test_each_term_alone_reaches_every_trained_parameter(term, visits):
    """Else distributed training would wait for it."""
    strategy = make(loss_weights={name: float(name == term) for name in TrajectoryOrder.LOSS_WEIGHTS})
    terms = strategy.losses(quickening(4, 0, visits))
    assert terms.keys() == {term}
    terms[term].backward()
    assert all(p.grad is not None for p in strategy.parameters() if p.requires_grad)
    assert strategy.backbone.network[0].weight.grad.abs().max() > 0


def test_times_are_needed_for_the_order_alone_and_wrong_options_are_refused():
    assert make().needs_times()
    assert not make(loss_weights={"order": 0.0}).needs_times()
    with pytest.raises(InputError, match="fewest is 1; an order is of 2 visits or more"):
        make(fewest=1)
    with pytest.raises(InputError, match=r"heads is 3, which must divide width \(32\)"):
        make(heads=3)


def trained(steps: int, shuffle: bool = False, visits: int = 3, grows: float = 0.5) -> TrajectoryOrder:
    """On a pool of series, of which ``visits`` are shown; ``shuffle`` gives their visits each other's times."""
    strategy, pool = make(fewest=visits), quickening(128, 0, grows=grows)
    optimizer = torch.optim.AdamW([p for p in strategy.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        strategy.generator.manual_seed(step)
        batch = pool.rows(torch.randperm(128, generator=strategy.generator)[:12])
        order = torch.rand(12, 3, generator=strategy.generator).argsort(1)
        if shuffle:
            batch = dataclasses.replace(batch, times=batch.times.gather(1, order))
        batch = batch.visits(order[:, :visits]) if visits < 3 else batch
        loss = strategy.total(strategy.losses(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return strategy.eval()


def in_order(scores: torch.Tensor) -> float:
    """Share of pairs that are in the right order, of scores in time order."""
    earlier, later = torch.triu_indices(scores.shape[1], scores.shape[1], 1)
    return (scores[:, later] > scores[:, earlier]).float().mean().item()


@torch.no_grad()
def found(strategy: TrajectoryOrder, visits: int = 3, grows: float = 0.5) -> float:
    """Share of pairs of new subjects' visits that are put in the right order, of those seen together."""
    views = drawn(strategy, quickening(128, 1, grows=grows))
    images = [[views[visit].image for visit in shown] for shown in combinations(range(3), visits)]
    return sum(in_order(strategy.scores(each)) for each in images) / len(images)


def test_planted_growth_is_found():
    assert found(trained(20, grows=1.0), grows=1.0) > 0.95


def test_the_head_finds_an_order_that_three_visits_tell_and_two_do_not():
    draw, scores = torch.Generator().manual_seed(0), SeriesScores(2, 32, depth=1, heads=2)
    vectors = torch.stack([heights_of(512, 3, draw), torch.randn(512, 3, generator=draw)], 2)
    optimizer = torch.optim.AdamW(scores.parameters(), lr=1e-2)
    for _ in range(80):
        loss = F.softplus(-scores(vectors[:256]).diff(dim=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert in_order(scores(vectors[256:])) > 0.93
        assert in_order(scores(vectors[256:, :2])) < 0.65
        assert in_order(scores(vectors[256:, ::2])) < 0.65


@pytest.mark.slow
def test_the_network_finds_an_order_that_three_visits_tell_and_two_do_not():
    strategy = trained(250)
    assert found(strategy) > 0.9
    assert found(strategy, visits=2) < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"visits": 2}, {"shuffle": True}])
def test_pairs_alone_or_shuffled_times_teach_nothing(options):
    strategy = trained(250, **options)
    assert abs(found(strategy, options.get("visits", 3)) - 0.5) < 0.15
