"""Percent change, by loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lssl.metrics import PercentChange


def by_loops(first: np.ndarray, second: np.ndarray) -> list[float]:
    result = []
    for one, two in zip(first.T, second.T, strict=True):
        values = [
            100 * abs(b - a) / ((a + b) / 2) for a, b in zip(one, two, strict=True) if a + b > 0 and a + b == a + b
        ]
        result.append(float(np.mean(values)) if values else math.nan)
    return result


def volumes() -> torch.Tensor:
    """Nine pairs of five structures: some absent in one visit or in both, one unknown, the last never there."""
    draw = torch.Generator().manual_seed(0)
    volumes = 3000 * torch.rand(2, 9, 5, generator=draw)
    volumes[:, :3, 0] = volumes[0, 4:7, 1] = volumes[1, 2, 2] = 0
    volumes[0, 8, 3] = math.nan
    volumes[..., 4] = 0
    return volumes


def test_value_by_loops_over_several_updates():
    first, second = volumes()
    metric = PercentChange(5)
    for rows in (slice(0, 4), slice(4, 5), slice(5, 9)):
        metric.update(first[rows], second[rows])
    expected = by_loops(first.double().numpy(), second.double().numpy())
    np.testing.assert_allclose(metric.compute().numpy(), expected, rtol=1e-6)
    assert [math.isnan(value) for value in expected] == [False] * 4 + [True]


def test_it_is_symmetric_and_says_percent():
    first, second = torch.tensor([[100.0, 50.0]]), torch.tensor([[110.0, 0.0]])
    for pair in ((first, second), (second, first)):
        metric = PercentChange(2)
        metric.update(*pair)
        assert metric.compute().tolist() == pytest.approx([1000 / 105, 200.0])


def test_a_constant_wins_it():
    metric = PercentChange(1)
    metric.update(torch.full((4, 1), 7.0), torch.full((4, 1), 7.0))
    assert metric.compute().item() == 0
