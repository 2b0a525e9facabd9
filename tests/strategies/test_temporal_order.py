"""Order and interval: their values, their signs, what is left out, and a planted ageing that is found."""

from __future__ import annotations

import dataclasses
import math

import pandas as pd
import planted
import pytest
import torch
from torch.distributions import Laplace

from lssl.data.pair_order import in_random_order
from lssl.metrics.visits import auc
from lssl.strategies.temporal_order import TemporalOrder
from lssl.utils.errors import InputError
from lssl.utils.intervals import require_order, signed_interval

NAN = float("nan")


def make(**options) -> TemporalOrder:
    return TemporalOrder(planted.backbone(), "deep", **{"hidden": 32, "views": planted.views(), **options})


def with_times(times: list[list[float]], seed: int = 0):
    return dataclasses.replace(planted.planted(len(times), seed), times=torch.tensor(times))


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_terms_by_hand(norm):
    """In float64 from the head's outputs; pairs of equal or unknown times are left out."""
    strategy, times = make(norm=norm), [[0.0, 2.0], [3.0, 1.5], [1.0, 1.0], [0.0, NAN], [NAN, NAN], [0.0, 0.1]]
    batch = with_times(times)
    first, second = strategy.views(batch, strategy.generator)
    terms = strategy.terms(first, second, batch)
    features = strategy.backbone(torch.cat([first.image, second.image]), ["deep"])["deep"].double()
    pooled = torch.cat([features.mean((2, 3, 4)), features.amax((2, 3, 4))], 1)
    one, two = strategy.head.double()(pooled).chunk(2)
    order, interval = [], []
    for (t1, t2), (s1, m1, u1), (s2, m2, u2) in zip(times, one.tolist(), two.tolist(), strict=True):
        if not abs(t2 - t1) > 0:
            continue
        order.append(math.log1p(math.exp(-math.copysign(1, t2 - t1) * (s2 - s1))))
        scale = torch.tensor(0.05 + math.log1p(math.exp(u1 + u2)))
        interval.append(-Laplace(torch.tensor(m2 - m1), scale).log_prob(torch.tensor(t2 - t1)).item())
    assert len(order) == 3
    assert terms["order"].item() == pytest.approx(sum(order) / 3, rel=1e-4)
    assert terms["interval"].item() == pytest.approx(sum(interval) / 3, rel=1e-4)
    assert strategy.logged["skipped"].item() == pytest.approx(0.5)


def test_swapping_the_visits_swaps_the_signs_and_nothing_else():
    strategy = make().eval()
    batch = planted.planted(5, 0)
    first, second = strategy.views(batch, strategy.generator)
    there, back = strategy.compare(first.image, second.image), strategy.compare(second.image, first.image)
    torch.testing.assert_close(there.order, -back.order, rtol=0, atol=1e-6)
    torch.testing.assert_close(there.years, -back.years, rtol=0, atol=1e-6)
    torch.testing.assert_close(there.scale, back.scale)
    assert there.order.abs().min() > 0
    one, other = strategy.terms(first, second, batch), strategy.terms(second, first, batch)
    assert all(one[name].item() == pytest.approx(other[name].item(), rel=1e-5) for name in one)
    assert strategy.compare(first.image, first.image).order.abs().max() < 1e-6


def test_no_pair_with_an_order_gives_zero_with_a_gradient():
    strategy = make()
    batch = with_times([[0.0, NAN], [2.0, 2.0]])
    terms = strategy.terms(*strategy.draw_views(batch), batch)
    assert [value.item() for value in terms.values()] == [0, 0]
    strategy.total(terms).backward()
    trained = [p for p in strategy.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)


@pytest.mark.parametrize("term", ["order", "interval"])
def test_each_term_alone_reaches_every_trained_parameter(term):
    """Else distributed training would wait for it."""
    strategy = make(loss_weights={name: float(name == term) for name in TemporalOrder.LOSS_WEIGHTS})
    batch = planted.planted(4, 0)
    terms = strategy.losses(batch)
    assert terms.keys() == {term}
    terms[term].backward()
    assert all(p.grad is not None for p in strategy.parameters() if p.requires_grad)
    assert strategy.backbone.network[0].weight.grad.abs().max() > 0


def test_visits_are_presented_in_random_order():
    strategy, batch = make(), planted.planted(200, 0)
    strategy.generator.manual_seed(0)
    first, second = strategy.draw_views(batch)
    years, ordered = signed_interval(first.time, second.time)
    assert ordered.all()
    assert 70 < (years > 0).sum() < 130
    torch.testing.assert_close(years.abs(), batch.times[:, 1])
    swapped = in_random_order(batch, torch.Generator().manual_seed(0))
    assert torch.equal(swapped.times[years < 0], batch.times[years < 0].flip(1))
    assert torch.equal(swapped.images[years < 0], batch.images[years < 0].flip(1))
    assert torch.equal(swapped.images[years > 0], batch.images[years > 0])
    assert torch.equal(swapped.subject, batch.subject)


@pytest.mark.parametrize(
    ("times", "refused"),
    [([0, 1, 0], False), ([0, NAN, 0], True), ([2, 2, 5], True), ([NAN, NAN, 0], True), ([0], True)],
)
def test_data_without_known_order_are_refused(times, refused):
    visits = pd.DataFrame({"subject": ["a", "a", "b"][: len(times)], "time": times})
    if refused:
        with pytest.raises(InputError, match="TemporalOrder learns from the years between visits"):
            require_order(visits, "TemporalOrder")
    else:
        require_order(visits, "TemporalOrder")


@pytest.mark.parametrize("control", [False, True])
def test_planted_ageing_is_found_and_shuffled_times_teach_nothing(control):
    strategy = planted.train(make(), 60, control)
    (order, years), truth = planted.held_out(strategy, lambda one, two: strategy.compare(one, two)[:2])
    found, r = auc(order, -order).item(), torch.corrcoef(torch.stack([years, truth]))[0, 1].item()
    # Without times, a network follows the one planted direction forward or backward by chance: 0.04 to 0.9 over seeds.
    assert found < 0.95 if control else found > 0.95, found
    assert abs(r) < 0.75 if control else r > 0.85, r
