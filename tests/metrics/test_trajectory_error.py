"""Rates of change, by numpy's polynomial fit subject by subject."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lssl.metrics import TrajectoryError
from lssl.utils.errors import InputError

Subject = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def rate(volumes: np.ndarray, ages: np.ndarray) -> float:
    return 100 * np.polyfit(ages, volumes, 1)[0] / volumes.mean() if volumes.any() else 0.0


def by_loops(subjects: list[Subject], structures: int) -> list[float]:
    result = []
    for k in range(structures):
        errors = []
        for predicted, truth, ages in subjects:
            p, t, a = predicted[:, k].double().numpy(), truth[:, k].double().numpy(), ages.double().numpy()
            known = np.isfinite(t) & np.isfinite(a)
            if len(set(a[known])) > 1 and t[known].any():
                errors.append(abs(rate(p[known], a[known]) - rate(t[known], a[known])))
        result.append(float(np.mean(errors)) if errors else math.nan)
    return result


def subjects() -> list[Subject]:
    """Irregular visits; a structure that is never predicted, unknown volumes and ages, a lone visit, an absence."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for visits in (2, 3, 5, 4, 1, 3):
        ages = 70 + torch.rand(visits, generator=draw).cumsum(0) * 3
        truth = 4000 * (1 + 0.03 * torch.randn(1, 4, generator=draw) * (ages - 70)[:, None])
        made.append((truth * (1 + 0.05 * torch.randn(visits, 4, generator=draw)), truth, ages))
    made[1][0][:, 0] = 0  # not predicted
    made[2][1][:, 1] = 0  # truly absent, though predicted
    made[2][1][1, 2] = math.nan  # one volume unknown
    made[3][2][2] = math.nan  # one age unknown
    made[5][2][:] = math.nan
    for _, truth, _ in made:
        truth[:, 3] = 0
    return made


def score(subjects: list[Subject], structures: int = 4) -> torch.Tensor:
    metric = TrajectoryError(structures)
    for subject in subjects:
        metric.update(*subject)
    return metric.compute()


def test_value_by_loops():
    expected = by_loops(subjects(), 4)
    np.testing.assert_allclose(score(subjects()).numpy(), expected, rtol=1e-5)
    assert all(value > 0.5 for value in expected[:3])
    assert math.isnan(expected[3])


def test_of_two_visits_it_is_the_symmetrised_rate():
    truth, ages = torch.tensor([[900.0], [1100.0]]), torch.tensor([60.0, 64.0])
    assert score([(torch.ones(2, 1), truth, ages)], 1).item() == pytest.approx(5)


def test_a_constant_bias_costs_nothing_and_the_order_of_visits_neither():
    _, truth, ages = subjects()[0]
    truth, ages = torch.cat([truth, truth.square() / 3000]), torch.cat([ages, ages + 7])
    assert score([(1.3 * truth, truth, ages)])[:3].max() < 1e-4
    back = torch.tensor([2, 0, 3, 1])
    one, other = (score([(truth.cumsum(0)[rows], truth[rows], ages[rows])]) for rows in (slice(None), back))
    torch.testing.assert_close(one, other, equal_nan=True)


def test_errors_of_opposite_sign_do_not_cancel():
    ages = torch.tensor([70.0, 72.0])
    up, down = torch.tensor([[99.0], [101.0]]), torch.tensor([[101.0], [99.0]])
    assert score([(up, down, ages), (down, up, ages)], 1).item() == pytest.approx(2)


def test_constant_predictions_lose_to_any_that_see_more_than_half_of_the_change():
    known = [subjects()[number] for number in (0, 4)]
    true_rates = by_loops([(torch.ones_like(truth), truth, ages) for _, truth, ages in known], 4)
    constant = score([(torch.full_like(truth, 123.0), truth, ages) for _, truth, ages in known])
    copied = score([(truth[:1].expand_as(truth), truth, ages) for _, truth, ages in known])
    half = score([(truth + (truth.mean(0) - truth) * 0.4, truth, ages) for _, truth, ages in known])
    np.testing.assert_allclose(constant[:3].numpy(), true_rates[:3], rtol=1e-5)
    torch.testing.assert_close(copied, constant, equal_nan=True)
    assert (half[:3] < 0.5 * constant[:3]).all()


def test_a_nan_prediction_is_not_hidden():
    truth, ages = torch.tensor([[9.0], [10.0], [11.0]]), torch.tensor([60.0, 62.0, 64.0])
    assert math.isnan(score([(torch.tensor([[9.0], [10.0], [math.nan]]), truth, ages)], 1).item())


def test_visits_must_fit():
    with pytest.raises(InputError, match=r"\(2, 3\) and \(2, 3\) .* do not fit to 3 times"):
        TrajectoryError(3).update(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3))
