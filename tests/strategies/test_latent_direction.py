"""LSSL: its terms by hand, what is left out, and a planted ageing whose direction is found."""

from __future__ import annotations

import dataclasses
import math

import planted
import pytest
import torch

from lssl.metrics.visits import auc
from lssl.strategies.latent_direction import LatentDirection

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


@pytest.mark.parametrize("control", [False, True])
def test_planted_ageing_lies_along_the_direction_and_shuffled_times_teach_nothing(control):
    strategy = planted.train(make(), 60, control)
    (change,), _ = planted.held_out(strategy, lambda one, two: (strategy.position(two) - strategy.position(one),))
    found = auc(change, -change).item()
    # One axis of ageing lets any direction order visits alike, or all of them backwards.
    assert found < 0.95 if control else found > 0.95, found
