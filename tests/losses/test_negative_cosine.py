"""Negative cosine: closed forms, and where its gradient stops."""

from __future__ import annotations

import pytest
import torch

from lssl.losses import NegativeCosine


def vectors(n: int = 4, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, 8, generator=draw, requires_grad=True) for _ in range(n)]


def test_equal_opposite_and_orthogonal_vectors():
    z, *_ = vectors()
    assert NegativeCosine()(z, 3 * z, z, z).item() == pytest.approx(-1, abs=1e-6)  # the length does not matter
    assert NegativeCosine()(-z, z, -2 * z, z).item() == pytest.approx(1, abs=1e-6)
    flat = torch.cat([z, torch.zeros_like(z)], -1), torch.cat([torch.zeros_like(z), z], -1)
    assert NegativeCosine()(flat[0], flat[0], flat[1], flat[1]).item() == pytest.approx(0, abs=1e-6)


def test_value_by_loops_in_float64():
    p1, z1, p2, z2 = vectors()
    expected = 0.0
    for b in range(2):
        for k in range(5):
            for p, z in ((p1[b, k].double(), z2[b, k].double()), (p2[b, k].double(), z1[b, k].double())):
                expected -= 0.5 * (p @ z / (p.norm() * z.norm())).item() / 10
    assert NegativeCosine()(p1, z1, p2, z2).item() == pytest.approx(expected, abs=1e-6)
    assert NegativeCosine()(p2, z2, p1, z1).item() == pytest.approx(expected, abs=1e-6)  # the views may be swapped


def test_each_prediction_is_held_against_the_other_view():
    p1, z1, z2 = vectors(3)
    value = NegativeCosine()(p1, z1, z1, z2)  # p2 = z1: the second half is -1 whatever the first
    assert value.item() == pytest.approx(-0.5 - 0.5 * torch.cosine_similarity(p1, z2, -1).mean().item(), abs=1e-6)


def test_no_gradient_reaches_the_projections():
    p1, z1, p2, z2 = vectors()
    NegativeCosine()(p1, z1, p2, z2).backward()
    assert z1.grad is None
    assert z2.grad is None
    assert p1.grad.abs().sum() > 0
    assert p2.grad.abs().sum() > 0


def test_weights_share_the_mean_among_the_samples_that_count():
    p1, z1, p2, z2 = vectors()
    second = NegativeCosine()(*(x[1:] for x in (p1, z1, p2, z2)))
    weighted = NegativeCosine()(p1, z1, p2, z2, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(weighted, second)
    assert torch.autograd.grad(weighted, p1)[0][0].abs().sum() == 0
    torch.testing.assert_close(NegativeCosine()(p1, z1, p2, z2, torch.ones(2)), NegativeCosine()(p1, z1, p2, z2))


def test_float32_under_autocast():
    inputs = vectors()
    with torch.autocast("cpu", torch.bfloat16):
        value = NegativeCosine()(*inputs)
    assert torch.equal(value, NegativeCosine()(*inputs))
    halves = [x.bfloat16() for x in inputs]
    assert NegativeCosine()(*halves).dtype == torch.float32
