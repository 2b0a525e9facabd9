"""Orthogonality: closed forms, loops, and gradients to both sides."""

from __future__ import annotations

import pytest
import torch

from lssl.losses import Orthogonality


def test_orthogonal_parallel_and_between():
    e, d = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [-5.0, 0.0]])
    assert Orthogonality()(e, d).item() == 0
    assert Orthogonality()(e, -4 * e).item() == pytest.approx(1)  # opposite says nothing new either
    half = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    assert Orthogonality()(e, half).item() == pytest.approx(0.5)  # cos² 45°


def test_mean_of_squares_not_square_of_mean():
    e = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    d = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert Orthogonality()(e, d).item() == pytest.approx(1)


def test_value_by_loops():
    e, d = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    expected = 0.0
    for a, b in zip(e.flatten(0, 1).double(), d.flatten(0, 1).double(), strict=True):
        expected += (a @ b / (a.norm() * b.norm())).item() ** 2 / 6
    assert Orthogonality()(e, d).item() == pytest.approx(expected, rel=1e-5)


def test_both_sides_get_a_gradient():
    e, d = torch.randn(4, 7, requires_grad=True), torch.randn(4, 7, requires_grad=True)
    Orthogonality()(e, d).backward()
    assert e.grad.abs().sum() > 0
    assert d.grad.abs().sum() > 0
    assert torch.equal(Orthogonality()(e, d), Orthogonality()(d, e))
