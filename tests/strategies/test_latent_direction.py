"""LSSL: its terms by hand, what is left out, and a planted ageing whose direction is found."""

from __future__ import annotations

import dataclasses
import math

import planted
import pytest
import torch

from lssl.metrics.visits import auc
from lssl.strategies.latent_direction import LatentDirection
from lssl.utils.intervals import signed_interval

NAN = float("nan")


def make(**options) -> LatentDirection:
    return LatentDirection(
        planted.backbone(), "deep", **{"latent": 16, "hidden": 32, "views": planted.views(), **options}
    )


def test_terms_by_hand():
    strategy, times = make(), [[0.0, 2.0], [3.0, 1.5], [1.0, 1.0], [0.0, NAN]]
    batch = dataclasses.replace(planted.planted(4, 0), times=torch.tensor(times))
    first, second = strategy.views(batch, strategy.generator)
    first, second = (dataclasses.replace(view, clean=view.image + 0.5) for view in (first, second))
    terms = strategy.terms(first, second, batch)
    with torch.no_grad():
        maps = strategy.autoencoder(strategy.backbone(torch.cat([first.image, second.image]), ["deep"])["deep"])
        made = strategy.autoencoder.decode(maps)
    clean = torch.cat([first.clean, second.clean])
    assert terms["reconstruction"].item() == pytest.approx(((made - clean).double() ** 2).mean().item(), rel=1e-5)
    one, two = maps.double().flatten(2).mean(2).chunk(2)
    tau = strategy.direction.detach().double().tolist()
    losses = []
    for number, sign in ((0, 1), (1, -1)):
        delta = [sign * (b - a) for a, b in zip(one[number].tolist(), two[number].tolist(), strict=True)]
        inner = sum(a * b for a, b in zip(delta, tau, strict=True))
        losses.append(1 - inner / math.hypot(*delta) / math.hypot(*tau))
    assert terms["direction"].item() == pytest.approx(sum(losses) / 2, rel=1e-4)
    assert strategy.logged["skipped"].item() == 0.5


def test_the_order_of_presentation_does_not_matter_and_is_random():
    strategy, batch = make().eval(), planted.planted(40, 0)
    first, second = strategy.draw_views(batch)
    years, _ = signed_interval(first.time, second.time)
    assert 8 < (years > 0).sum() < 32
    one, other = strategy.terms(first, second, batch), strategy.terms(second, first, batch)
    assert all(one[name].item() == pytest.approx(other[name].item(), rel=1e-5) for name in one)


@pytest.mark.parametrize("used", [("reconstruction",), ("direction",), ("reconstruction", "direction")])
def test_terms_in_use_reach_every_trained_parameter(used):
    """Else distributed training would wait for it."""
    strategy = make(loss_weights={name: float(name in used) for name in LatentDirection.LOSS_WEIGHTS})
    terms = strategy.losses(planted.planted(4, 0))
    assert terms.keys() == {*used}
    strategy.total(terms).backward()
    assert all(p.grad is not None for p in strategy.parameters() if p.requires_grad)
    assert strategy.backbone.network[0].weight.grad.abs().max() > 0
    assert (strategy.show_reconstruction(strategy.views.centred(planted.planted(1, 0))[0]) is None) == (
        "reconstruction" not in used
    )


@pytest.mark.parametrize("control", [False, True])
def test_planted_ageing_lies_along_the_direction_and_shuffled_times_teach_nothing(control):
    strategy = planted.train(make(), 60, control)
    (change,), _ = planted.held_out(strategy, lambda one, two: (strategy.position(two) - strategy.position(one),))
    found = auc(change, -change).item()
    # One axis of ageing lets any direction order visits alike, or all of them backwards.
    assert found < 0.95 if control else found > 0.95, found
