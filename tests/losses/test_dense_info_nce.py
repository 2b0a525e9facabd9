"""Dense InfoNCE against a loop over points in float64."""

from __future__ import annotations

import math

import pytest
import torch

from lssl.losses import DenseInfoNCE


def inputs(b: int = 2, k: int = 7, d: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    z1, z2 = (torch.randn(b, k, d, generator=draw) * 3 for _ in range(2))
    places = 12 * torch.rand(b, k, 3, generator=draw, dtype=torch.float64)
    places[:, -1] = places[:, 0]  # a point that is drawn twice
    return z1, z2, places


def by_loops(z1, z2, places, temperature: float, exclusion: float) -> list[float]:
    """One loss per sample."""
    losses = []
    for q, k, x in zip(z1.double(), z2.double(), places, strict=True):
        total, n = 0.0, len(q)
        for one, two in ((q, k), (k, q)):
            for i in range(n):

                def score(j: int, one=one, two=two, i=i) -> float:
                    cosine = (one[i] @ two[j] / (one[i].norm() * two[j].norm())).item()
                    return math.exp(cosine / temperature)

                negatives = sum(score(j) for j in range(n) if math.dist(x[i].tolist(), x[j].tolist()) > exclusion)
                total -= 0.5 * math.log(score(i) / (score(i) + negatives)) / n
        losses.append(total)
    return losses


@pytest.mark.parametrize("exclusion", [0.0, 6.0, 100.0])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_value_by_loops(temperature: float, exclusion: float):
    expected = by_loops(*inputs(), temperature, exclusion)
    value = DenseInfoNCE(temperature, exclusion)(*inputs())
    assert value.item() == pytest.approx(sum(expected) / 2, rel=1e-5, abs=1e-7)
    weighted = DenseInfoNCE(temperature, exclusion)(*inputs(), torch.tensor([0.0, 1.0]))
    assert weighted.item() == pytest.approx(expected[1], rel=1e-5, abs=1e-7)


def test_gradient_is_that_of_the_formula_on_both_sides():
    z1, z2, places = inputs()
    z1, z2 = z1[:1].double().requires_grad_(), z2[:1].double().requires_grad_()
    loss = DenseInfoNCE(0.5, 6.0)
    found = torch.autograd.grad(loss(z1, z2, places[:1]), (z1, z2))
    for side, gradient in enumerate(found):
        for index in ((0, 2, 1), (0, 5, 3)):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [z1.detach().clone(), z2.detach().clone()]
                moved[side][index] += step
                ends.append(by_loops(*moved, places[:1], 0.5, 6.0)[0])
            assert gradient[index].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-5)


def test_views_may_be_swapped_and_points_permuted():
    z1, z2, places = inputs()
    value = DenseInfoNCE()(z1, z2, places)
    torch.testing.assert_close(DenseInfoNCE()(z2, z1, places), value)
    order = torch.randperm(z1.shape[1], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(DenseInfoNCE()(z1[:, order], z2[:, order], places[:, order]), value)


def test_points_within_the_radius_are_no_negatives():
    z1, z2, _ = inputs(1, 3)
    line = torch.tensor([[[0.0, 0, 0], [8.0, 0, 0], [100.0, 0, 0]]], dtype=torch.float64)
    near = z2.clone()
    near[0, 1] = z1[0, 0]  # a perfect false match 8 mm away
    value = DenseInfoNCE(exclusion=8.0)
    rows = [value(z1, z, line) for z in (z2, near)]
    far = by_loops(z1[:, [0, 2]], near[:, [0, 2]], line[:, [0, 2]], 0.1, 8.0)[0]
    assert by_loops(z1, near, line, 0.1, 8.0)[0] == pytest.approx(rows[1].item(), rel=1e-5)
    assert by_loops(z1, near, line, 0.1, 7.9)[0] > far
    assert rows[0] != rows[1]  # through its own positive only


def test_chance_is_the_logarithm_of_the_candidates():
    z = torch.ones(1, 5, 4)
    places = 50 * torch.arange(5.0).view(1, 5, 1).expand(1, 5, 3)
    assert DenseInfoNCE()(z, z, places).item() == pytest.approx(math.log(5), rel=1e-6)


def test_float32_under_autocast():
    expected = DenseInfoNCE()(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(DenseInfoNCE()(*inputs()), expected)
