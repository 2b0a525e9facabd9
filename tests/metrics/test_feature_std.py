"""Deviation and correlation of channels, by numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lssl.metrics import ChannelCorrelation, FeatureStd
from lssl.networks.heads import feature_std


def rows(n: int = 60, c: int = 5) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(n, c, generator=draw) @ torch.randn(c, c, generator=draw) + torch.arange(c)


def value(metric, *parts: torch.Tensor) -> float:
    for part in parts:
        metric.update(part)
    return metric.compute().item()


def test_std_of_normalised_rows_by_numpy_in_one_and_in_many_updates():
    x = rows()
    unit = x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    expected = unit.std(0).mean() * math.sqrt(5)
    assert value(FeatureStd(5), x) == pytest.approx(expected, rel=1e-6)
    assert value(FeatureStd(5), *x.split(7)) == pytest.approx(expected, rel=1e-6)
    assert value(FeatureStd(5), x) == pytest.approx(feature_std(x).item(), rel=1e-5)  # what strategies log


def test_std_is_one_on_the_sphere_and_zero_at_a_point_whatever_the_size():
    sphere = torch.randn(20_000, 16)
    assert value(FeatureStd(16), sphere * torch.rand(20_000, 1)) == pytest.approx(1, abs=0.02)
    assert value(FeatureStd(16), torch.rand(50, 1) * torch.randn(16)) == pytest.approx(0, abs=1e-5)


def test_scale_is_the_std_of_the_features_as_they_are():
    x = rows()
    assert value(FeatureStd(5, normalise=False), x) == pytest.approx(x.double().numpy().std(0).mean(), rel=1e-6)
    assert value(FeatureStd(5, normalise=False), 1e-4 * x) == pytest.approx(1e-4 * x.numpy().std(0).mean(), rel=1e-5)
    assert math.isnan(value(FeatureStd(5)))


def test_correlation_by_numpy():
    x = rows()
    table = np.abs(np.corrcoef(x.double().numpy().T))
    expected = (table.sum() - 5) / 20
    assert 0.1 < expected < 0.9
    assert value(ChannelCorrelation(5), *x.split(7)) == pytest.approx(expected, rel=1e-6)


def test_channels_that_repeat_one_another_also_with_the_other_sign():
    x = torch.randn(50, 1)
    assert value(ChannelCorrelation(3), torch.cat([x, -2 * x, x + 7], 1)) == pytest.approx(1, abs=1e-6)


def test_dead_channels_are_left_out():
    x = rows()
    dead = torch.cat([x, torch.full((60, 2), 3.3)], 1)
    assert value(ChannelCorrelation(7), dead) == pytest.approx(value(ChannelCorrelation(5), x), rel=1e-6)
    assert math.isnan(value(ChannelCorrelation(2), torch.ones(9, 2)))
