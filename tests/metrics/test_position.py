"""How much of the place in the crop a ridge regression reads off features, by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lssl.metrics import PositionR2

CHANNELS = 6


def crops(kind: str, n: int = 8, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw, found = torch.Generator().manual_seed(seed), []
    mix = torch.randn(3, CHANNELS, generator=draw)
    for _ in range(n):
        places = 20 * torch.rand(100, 3, generator=draw)
        noise = torch.randn(100, CHANNELS, generator=draw)
        features = {"linear": places @ mix + 40, "noise": noise, "both": 0.1 * places @ mix + noise}[kind]
        found.append((features, places))
    return found


def r2(parts: list[tuple[torch.Tensor, torch.Tensor]], **settings) -> float:
    metric = PositionR2(CHANNELS, **settings)
    for features, places in parts:
        metric.update(features, places)
    return metric.compute().item()


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_value_by_explicit_ridge_on_the_other_half_of_the_crops(ridge: float):
    parts = crops("both")
    (x, y), (u, v) = (
        [torch.cat(columns).double().numpy() for columns in zip(*parts[half::2], strict=True)] for half in (0, 1)
    )
    mean, scale = x.mean(0), x.std(0)
    standard, target = (x - mean) / scale, y - y.mean(0)
    slope = np.linalg.solve(standard.T @ standard + ridge * len(x) * np.eye(CHANNELS), standard.T @ target)
    residual = v - ((u - mean) / scale @ slope + y.mean(0))
    expected = (1 - (residual**2).mean(0) / v.var(0)).mean()
    assert 0.1 < expected < 0.95
    assert r2(parts, ridge=ridge) == pytest.approx(expected, abs=1e-5)


def test_linear_features_tell_the_place_and_noise_does_not():
    assert r2(crops("linear"), ridge=1e-8) == pytest.approx(1.0, abs=1e-3)
    assert abs(r2(crops("noise", 40))) < 0.02


def test_features_that_know_one_axis_explain_a_third():
    parts = [(torch.cat([places[:, :1], features[:, 1:]], 1), places) for features, places in crops("noise", 40)]
    assert r2(parts) == pytest.approx(1 / 3, abs=0.02)


def test_what_holds_in_one_half_only_does_not_count():
    """Place encoded with opposite signs in alternate crops: the fit must not carry over."""
    parts = [(features * (-1) ** i, places) for i, (features, places) in enumerate(crops("linear"))]
    assert r2(parts) < 0


def test_one_voxel_kind_in_constant_features_is_no_number_error():
    parts = [(torch.ones_like(features), places) for features, places in crops("noise", 40)]
    assert abs(r2(parts)) < 0.02


def test_updates_are_crops_and_their_rows_may_come_in_any_order():
    parts = crops("both")
    shuffled = [(features.flip(0), places.flip(0)) for features, places in parts]
    assert r2(shuffled) == pytest.approx(r2(parts), abs=1e-6)


def test_crops_may_say_which_half_they_belong_to():
    """As processes do that hold every second crop each."""
    parts, metric = crops("both"), PositionR2(CHANNELS)
    for number in [0, 2, 4, 6, 1, 3, 5, 7]:
        metric.update(*parts[number], crop=number)
    assert metric.compute().item() == pytest.approx(r2(parts), abs=1e-6)
