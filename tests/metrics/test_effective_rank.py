"""Effective rank, by singular values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lssl.metrics import EffectiveRank


def rank(*parts: torch.Tensor) -> float:
    metric = EffectiveRank(parts[0].shape[1])
    for part in parts:
        metric.update(part)
    return metric.compute().item()


def features(n: int = 60, c: int = 8) -> torch.Tensor:
    return torch.randn(n, c) @ torch.randn(c, c) + 10 * torch.randn(c)


def test_value_by_singular_values_of_centred_rows():
    rows = features()
    sigma = np.linalg.svd((rows - rows.mean(0)).double().numpy(), compute_uv=False)
    p = sigma / sigma.sum()
    assert rank(rows) == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-4)


def test_updates_add_up_in_any_order_and_repetition_changes_nothing():
    rows = features()
    assert rank(*rows.split(7)) == pytest.approx(rank(rows), rel=1e-6)
    assert rank(rows, rows) == pytest.approx(rank(rows), rel=1e-6)
    assert rank(rows.flip(0)[:20], rows.flip(0)[20:]) == pytest.approx(rank(rows), rel=1e-6)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_equal_spread_over_k_orthogonal_directions_is_rank_k(k: int):
    basis = torch.linalg.qr(torch.randn(8, 8))[0][:k]
    rows = torch.cat([basis, -basis]) + 5.0  # a common offset counts for nothing
    assert rank(rows) == pytest.approx(k, rel=1e-3)
