"""Variance hinge: closed forms, and float64 loops."""

from __future__ import annotations

import pytest
import torch

from lssl.losses import Variance


def test_constant_rows_cost_one_less_the_root_of_eps():
    z = torch.full((9, 4), 3.0, requires_grad=True)
    value = Variance()(z, z)
    assert value.item() == pytest.approx(0.99, abs=1e-6)  # 1 - √1e-4
    assert torch.autograd.grad(value, z)[0].isfinite().all()


def test_unit_variance_costs_nothing_and_the_variance_is_unbiased():
    z = torch.tensor([[1.0], [-1.0]]) / 2**0.5  # unbiased variance 1, biased ½
    assert Variance()(z, z).item() == 0
    expected = 1 - (0.5 + 1e-4) ** 0.5
    assert Variance()(z / 2**0.5, z / 2**0.5).item() == pytest.approx(expected, abs=1e-6)


def test_views_are_averaged_dimensions_hinged_apart():
    a, b = torch.randn(20, 3, dtype=torch.float64) * 0.4, torch.randn(20, 3, dtype=torch.float64) * 0.7
    a[:, 0] *= 100  # far above the hinge: must not make up for the others
    expected = 0.0
    for z in (a, b):
        for d in range(3):
            column = z[:, d] - z[:, d].mean()
            deviation = ((column @ column).item() / 19 + 1e-4) ** 0.5
            expected += 0.5 * max(0.0, 1 - deviation) / 3
    assert Variance()(a, b).item() == pytest.approx(expected, abs=1e-6)


def test_gradient_pushes_a_narrow_dimension_apart():
    z = (0.1 * torch.randn(16, 2)).requires_grad_()
    Variance()(z, z).backward()
    moved = z.detach() - 0.1 * z.grad
    assert (moved.var(0) > z.var(0)).all()


def test_float32_under_autocast():
    z = torch.randn(16, 4)
    expected = Variance()(z, z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Variance()(z, z), expected)
        assert Variance()(z.bfloat16(), z.bfloat16()).dtype == torch.float32
