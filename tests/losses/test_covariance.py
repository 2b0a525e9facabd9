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


@pytest.mark.parametrize("n", [7, 20, 30])
def test_products_of_rows_or_of_dimensions_give_one_value_and_gradient(n: int):
    """Fewer rows than the 20 dimensions, as many, and more; two rows are not used; two sets at once."""
    z, used = torch.randn(2, n, 20).double().requires_grad_(), torch.ones(2, n)
    used[0, [1, 4]] = 0
    loss = Covariance()
    found = loss._each(z, used.double())
    expected = []
    for rows, which in zip(z, used, strict=True):
        covariance = rows[which > 0].T.cov()
        expected.append((covariance - covariance.diagonal().diag()).square().sum() / 20)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=0)
    scale = torch.tensor([1.0, 3.0]).double()
    gradients = [torch.autograd.grad((scale * value).sum(), z)[0] for value in (found, torch.stack(expected))]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    rounded = loss(z.float(), z.float(), used, used)
    torch.testing.assert_close(rounded, 2 * found.float(), rtol=1e-5, atol=0)
