"""Covariance penalty: closed forms, float64 loops, and its floor."""

from __future__ import annotations

import itertools

import pytest
import torch

from lssl.losses import Covariance


def by_loops(z: torch.Tensor) -> float:
    n, d = z.shape
    centred = z.double() - z.double().mean(0)
    total = 0.0
    for i, j in itertools.product(range(d), repeat=2):
        if i != j:
            total += ((centred[:, i] @ centred[:, j]).item() / (n - 1)) ** 2
    return total / d


def test_diagonal_covariance_costs_nothing_whatever_the_mean():
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert Covariance()(z * 5 + 7, z).item() == pytest.approx(0, abs=1e-9)


def test_repeated_dimension():
    z = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]) / 2**0.5  # variance 1, covariance 1: (1² + 1²) / 2 for each view
    assert Covariance()(z, z).item() == pytest.approx(2.0)


def test_value_by_loops_summed_over_views():
    a, b = torch.randn(20, 6), 2 * torch.randn(15, 6) + 1
    assert Covariance()(a, b).item() == pytest.approx(by_loops(a) + by_loops(b), rel=1e-5)
    assert Covariance()(a, b).item() == pytest.approx(Covariance()(b, a).item(), rel=1e-6)


def test_floor_of_fewer_rows_than_dimensions():
    """Standardised rows as uncorrelated as n rows in D dimensions can be."""
    n, d = 9, 64
    basis = torch.linalg.qr(torch.cat([torch.ones(n, 1), torch.randn(n, n - 1)], 1).double())[0][:, 1:]  # sums to 0
    directions = torch.linalg.qr(torch.randn(d, n - 1).double())[0]
    # a tight frame: D unit vectors in n - 1 dimensions, by alternating between norms and tightness
    for _ in range(500):
        directions = directions / directions.norm(dim=1, keepdim=True)
        u, _, v = torch.linalg.svd(directions, full_matrices=False)
        directions = (d / (n - 1)) ** 0.5 * u @ v
    z = (n - 1) ** 0.5 * basis @ directions.T
    torch.testing.assert_close(z.var(0), torch.ones(d, dtype=torch.float64), rtol=1e-3, atol=1e-3)
    floor = d / (n - 1) - 1
    assert Covariance()(z, z).item() == pytest.approx(2 * floor, rel=1e-3)
    random = torch.randn(n, d)
    random = (random - random.mean(0)) / random.std(0)
    assert Covariance()(random, random).item() > 2 * floor


def test_float32_under_autocast():
    z = torch.randn(16, 4)
    expected = Covariance()(z, z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Covariance()(z, z), expected)
