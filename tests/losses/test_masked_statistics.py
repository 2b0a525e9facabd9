"""Variance and covariance over the rows that are used, against numpy on these rows alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lssl.losses import Covariance, Variance

LOSSES = [Variance(), Covariance()]
BOTH = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)


def inputs(n: int = 12, d: int = 4) -> list[Tensor]:
    """Rows of both views, then which of them are used: others for each view; the unused would stand out."""
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(d, d, generator=draw)
    z1, z2 = (0.4 * torch.randn(n, d, generator=draw) @ mixed + 3 for _ in range(2))
    used1, used2 = torch.ones(n), torch.ones(n)
    used1[[0, 3, 4]] = 0
    used2[[3, 8, 9, 10, 11]] = 0
    z1[used1 == 0] += 20
    z2[used2 == 0] *= -30
    return [z1, z2, used1, used2]


def by_numpy(loss: nn.Module, *rows: Tensor) -> float:
    """Of both views' used rows."""
    total = 0.0
    for z in rows:
        z = z.detach().double().numpy()
        if isinstance(loss, Variance):
            total += 0.5 * np.maximum(0, 1 - np.sqrt(z.var(0, ddof=1) + 1e-4)).mean()
        else:
            covariance = np.cov(z, rowvar=False)
            total += ((covariance**2).sum() - (np.diag(covariance) ** 2).sum()) / z.shape[1]
    return total


@BOTH
@pytest.mark.parametrize("kind", [torch.float32, torch.bool, torch.long])
def test_value_is_numpys_on_the_used_rows_of_each_view(loss: nn.Module, kind: torch.dtype):
    z1, z2, used1, used2 = inputs()
    expected = by_numpy(loss, z1[used1 > 0], z2[used2 > 0])
    assert expected > 0.01
    assert loss(z1, z2, used1.to(kind), used2.to(kind)).item() == pytest.approx(expected, rel=1e-5)
    assert loss(z2, z1, used2.to(kind), used1.to(kind)).item() == pytest.approx(expected, rel=1e-5)


@BOTH
def test_one_view_may_be_used_whole(loss: nn.Module):
    z1, z2, used1, _ = inputs()
    expected = by_numpy(loss, z1[used1 > 0], z2)
    assert loss(z1, z2, used1=used1).item() == pytest.approx(expected, rel=1e-5)
    assert loss(z2, z1, used2=used1).item() == pytest.approx(expected, rel=1e-5)
    assert loss(z1, z2, torch.ones(12), torch.ones(12)).item() == pytest.approx(loss(z1, z2).item(), rel=1e-6)


@BOTH
def test_gradient_is_that_of_the_used_rows_alone(loss: nn.Module):
    z1, z2, used1, used2 = inputs()
    pair = [z1.requires_grad_(), z2.requires_grad_()]
    found = torch.autograd.grad(loss(*pair, used1, used2), pair)
    alone = [z[used > 0].detach().requires_grad_() for z, used in zip(pair, (used1, used2), strict=True)]
    expected = torch.autograd.grad(loss(*alone), alone)
    for gradient, wanted, used in zip(found, expected, (used1, used2), strict=True):
        assert torch.equal(gradient[used == 0], torch.zeros(int((used == 0).sum()), 4))
        assert (gradient[used > 0].abs().sum(1) > 1e-4).all()
        torch.testing.assert_close(gradient[used > 0], wanted, rtol=1e-4, atol=1e-6)


@BOTH
@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_give_exactly_zero_and_a_finite_gradient(loss: nn.Module, rows: int):
    z1, z2, _, _ = inputs()
    pair = [z1.requires_grad_(), z2.requires_grad_()]
    few = (torch.arange(12) < rows).float()
    value = loss(*pair, few, few)
    assert value.item() == 0
    assert all(torch.equal(gradient, torch.zeros(12, 4)) for gradient in torch.autograd.grad(value, pair))


@BOTH
def test_a_view_without_rows_leaves_the_other(loss: nn.Module):
    z1, z2, used1, _ = inputs()
    other = z1[used1 > 0]
    half = 0.5 * by_numpy(loss, other, other)
    assert loss(z1, z2, used1, torch.zeros(12)).item() == pytest.approx(half, rel=1e-5)


@BOTH
def test_float32_under_autocast(loss: nn.Module):
    z1, z2, used1, used2 = inputs()
    expected = loss(z1, z2, used1, used2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(z1, z2, used1, used2), expected)
        assert loss(z1.bfloat16(), z2.bfloat16(), used1, used2).dtype == torch.float32
