"""Trajectory prediction: its term by hand, where gradients go, and a planted ageing that is predicted."""

from __future__ import annotations

import dataclasses
import math

import planted
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lssl.metrics.visits import auc
from lssl.strategies.trajectory_prediction import TrajectoryPrediction
from lssl.utils.intervals import signed_interval

NAN = float("nan")
TIMES = [[0.0, 2.0], [3.0, 1.5], [1.0, 1.0], [0.0, NAN], [0.0, 4.0], [NAN, NAN]]


def make(**options) -> TrajectoryPrediction:
    small = {"hidden": 64, "projection": 16, "views": planted.views()}
    return TrajectoryPrediction(planted.backbone(), "deep", **{**small, **options})


def batch_of(times: list):
    return dataclasses.replace(planted.planted(len(times), 0), times=torch.tensor(times))


def moved(strategy: TrajectoryPrediction) -> TrajectoryPrediction:
    """With a teacher that differs from the network."""
    if strategy.teacher is not None:
        for parameter in strategy.teacher.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return strategy


@pytest.mark.parametrize("momentum", [0.9, None])
def test_term_by_hand(momentum):
    """In evaluation mode, so that a visit's features do not depend on the batch."""
    strategy, batch = moved(make(momentum=momentum)).eval(), batch_of(TIMES)
    first, second = strategy.views(batch, strategy.generator)
    found = strategy.terms(first, second, batch)["prediction"].item()
    modules = {"backbone": strategy.backbone, "projector": strategy.projector}
    teacher = modules if momentum is None else strategy.teacher
    losses = []
    for number, (t1, t2) in enumerate(TIMES):
        if math.isnan(t2 - t1):
            continue
        earlier, later = (first, second) if t1 <= t2 else (second, first)
        embedded = []
        for view, network in ((earlier, modules), (later, teacher)):
            features = network["backbone"](view.image[number : number + 1], ["deep"])["deep"]
            pooled = torch.cat([features.mean((2, 3, 4)), features.amax((2, 3, 4))], 1)
            embedded.append(network["projector"](pooled))
        time = torch.tensor([[abs(t2 - t1), math.log(1 + abs(t2 - t1))]])
        p, t = (row[0].tolist() for row in (strategy.predictor(torch.cat([embedded[0], time], 1)), embedded[1]))
        losses.append(1 - sum(a * b for a, b in zip(p, t, strict=True)) / math.hypot(*p) / math.hypot(*t))
    assert len(losses) == 4
    assert found == pytest.approx(sum(losses) / 4, rel=1e-4)
    assert strategy.logged["skipped"].item() == pytest.approx(1 / 3)


def test_the_order_of_presentation_does_not_matter_and_is_random():
    strategy, batch = make(), planted.planted(40, 0)
    first, second = strategy.draw_views(batch)
    years, _ = signed_interval(first.time, second.time)
    assert 8 < (years > 0).sum() < 32
    one, other = strategy.terms(first, second, batch), strategy.terms(second, first, batch)
    assert one["prediction"].item() == pytest.approx(other["prediction"].item(), rel=1e-5)


@pytest.mark.parametrize("momentum", [0.9, None])
def test_gradients_come_from_the_earlier_visit_alone_and_reach_every_trained_parameter(momentum):
    strategy, batch = moved(make(momentum=momentum)).eval(), batch_of([[0.0, 2.0], [0.0, 1.0], [3.0, 1.5], [2.0, 1.0]])
    first, second = strategy.views(batch, strategy.generator)
    leaves = [view.image.clone().requires_grad_() for view in (first, second)]
    views = (dataclasses.replace(view, image=leaf) for view, leaf in zip((first, second), leaves, strict=True))
    strategy.terms(*views, batch)["prediction"].backward()
    reached = torch.stack([leaf.grad.flatten(1).any(1) for leaf in leaves])
    assert reached.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert all(p.grad is not None for p in strategy.parameters() if p.requires_grad)
    assert strategy.backbone.network[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize(("momentum", "control"), [(0.95, False), (None, False), (0.95, True)])
def test_planted_ageing_is_predicted_and_shuffled_times_teach_nothing(momentum, control):
    """The interval whose forecast fits best: long where the visits go forwards, short where they go backwards."""
    strategy = planted.train(make(momentum=momentum), 120, control, pairs=32)

    def best(one: Tensor, two: Tensor) -> tuple[Tensor, ...]:
        z, grid = [strategy.project(image) for image in (one, two)], torch.arange(0, 8, 0.25)
        fits = []
        for a, b in (z, z[::-1]):
            rows = strategy.forecast(a.repeat_interleave(len(grid), 0), grid.repeat(len(a)))
            cosine = F.cosine_similarity(rows, b.repeat_interleave(len(grid), 0))
            fits.append(grid[cosine.unflatten(0, (len(a), -1)).argmax(1)])
        return fits[0], fits[1]

    (there, back), years = planted.held_out(strategy, best)
    found, r = auc(there, back).item(), torch.corrcoef(torch.stack([there, years]))[0, 1].item()
    assert found < 0.75 if control else found > 0.85, found
    assert r < 0.2 if control else r > 0.3, r
    assert strategy.losses(planted.planted(32, 1))["prediction"] < 0.2
    assert strategy.logged["feature_std"] > 0.1
