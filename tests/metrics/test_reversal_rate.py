"""Reversals, by loops."""

from __future__ import annotations

import math

import numpy as np
import torch

from lssl.metrics import ReversalRate


def by_loops(subjects: list[tuple[torch.Tensor, torch.Tensor]], structures: int) -> list[float]:
    result = []
    for k in range(structures):
        hits = []
        for predicted, truth in subjects:
            for v in range(len(truth) - 1):
                seen, true = (float(volumes[v + 1, k] - volumes[v, k]) for volumes in (predicted, truth))
                if true != 0 and not math.isnan(true):
                    hits.append(math.nan if math.isnan(seen) else (seen > 0 > true) or (seen < 0 < true))
        result.append(float(np.mean(hits)) if hits else math.nan)
    return result


def subjects() -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(2)
    made = [(torch.randn(v, 4, generator=draw), torch.randn(v, 4, generator=draw)) for v in (1, 2, 5, 9)]
    made[2][1][1:4, 0] = 2.0  # no true change
    made[2][0][1:3, 1] = 0.0  # none predicted
    made[2][1][0, 2] = made[3][1][6, 2] = math.nan
    for _, truth in made:
        truth[:, 3] = 5.0
    return made


def test_value_by_loops():
    metric = ReversalRate(4)
    for subject in subjects():
        metric.update(*subject)
    expected = by_loops(subjects(), 4)
    np.testing.assert_allclose(metric.compute().numpy(), expected, rtol=1e-6)
    assert all(0.1 < value < 0.9 for value in expected[:3])
    assert math.isnan(expected[3])


def test_the_truth_its_opposite_and_a_constant():
    truth = torch.rand(6, 2, generator=torch.Generator().manual_seed(1)).cumsum(0)
    for predicted, expected in ((truth, 0), (-truth, 1), (torch.ones(6, 2), 0), (2 * truth + 3, 0)):
        metric = ReversalRate(2)
        metric.update(predicted, truth)
        assert metric.compute().tolist() == [expected] * 2


def test_a_nan_prediction_is_not_hidden():
    metric = ReversalRate(2)
    metric.update(torch.tensor([[1.0, 1], [math.nan, 2]]), torch.tensor([[1.0, 1], [2, 2]]))
    assert math.isnan(metric.compute()[0].item())
    assert metric.compute()[1] == 0


def test_tiny_volumes_do_not_underflow():
    truth = torch.tensor([[1e-30], [2e-30]])
    metric = ReversalRate(1)
    metric.update(truth.flip(0), truth)
    assert metric.compute().item() == 1
