"""NT-Xent against a loop over views and pairs in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lssl.losses import NTXent

SUBJECTS = torch.tensor([3, 1, 3, 0, 8])  # the first and third pair are of one subject
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.3])


def inputs(d: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(len(SUBJECTS), d, generator=draw) * 3 for _ in range(2))


def by_loops(z1, z2, subject=SUBJECTS, weight=None, temperature: float = 0.2) -> float:
    views = [[z / z.norm() for z in view.double()] for view in (z1, z2)]
    subject = subject.tolist()
    weight = [1.0] * len(subject) if weight is None else weight.tolist()
    total = share = 0.0
    for own, other in ((0, 1), (1, 0)):
        for i, query in enumerate(views[own]):

            def score(key: Tensor, query=query) -> float:
                return math.exp((query @ key).item() / temperature)

            others = [key for view in views for key, s in zip(view, subject, strict=True) if s != subject[i]]
            positive = score(views[other][i])
            total -= weight[i] * math.log(positive / (positive + sum(score(key) for key in others)))
            share += weight[i]
    return total / share


@pytest.mark.parametrize("weight", [None, WEIGHTS])
@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_value_by_loops(temperature: float, weight: Tensor | None):
    expected = by_loops(*inputs(), weight=weight, temperature=temperature)
    value = NTXent(temperature)(*inputs(), SUBJECTS, weight)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_chance_is_the_logarithm_of_the_candidates():
    """All embeddings alike: the partner, and both views of the other subjects' pairs; never the query itself."""
    z = torch.ones(4, 3)
    assert NTXent()(z, z, torch.arange(4)).item() == pytest.approx(math.log(1 + 2 * 3), rel=1e-6)
    assert NTXent()(z, z, torch.tensor([0, 0, 1, 1])).item() == pytest.approx(math.log(1 + 2 * 2), rel=1e-6)


def test_own_subject_and_oneself_are_no_negatives():
    z1, z2 = inputs()
    value = NTXent()(z1, z2, SUBJECTS, torch.tensor([1.0, 0, 0, 0, 0]))
    near1, near2 = z1.clone(), z2.clone()
    near1[2] = near2[2] = z1[0]  # another pair of the subject, as near as can be
    assert NTXent()(near1, near2, SUBJECTS, torch.tensor([1.0, 0, 0, 0, 0])) == value
    strangers = torch.arange(5)
    assert NTXent()(near1, near2, strangers, torch.tensor([1.0, 0, 0, 0, 0])) > value + 0.5


def test_weights_may_have_any_scale():
    one, two = (NTXent()(*inputs(), SUBJECTS, scale * WEIGHTS) for scale in (1, 7))
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(NTXent()(*inputs(), SUBJECTS, torch.full((5,), 3.0)), NTXent()(*inputs(), SUBJECTS))


def test_views_may_be_swapped_and_pairs_permuted():
    z1, z2 = inputs()
    value = NTXent()(z1, z2, SUBJECTS, WEIGHTS)
    torch.testing.assert_close(NTXent()(z2, z1, SUBJECTS, WEIGHTS), value)
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(NTXent()(z1[order], z2[order], SUBJECTS[order], WEIGHTS[order]), value)


def test_gradient_is_that_of_the_formula_through_queries_and_keys():
    pair = [z.double().requires_grad_() for z in inputs()]
    found = torch.autograd.grad(NTXent(0.5)(*pair, SUBJECTS, WEIGHTS), pair)
    for side in range(2):
        for index in ((0, 1), (2, 5), (4, 3)):  # pair 2 has weight 0: it is a key only
            ends = []
            for step in (1e-5, -1e-5):
                moved = [z.detach().clone() for z in pair]
                moved[side][index] += step
                ends.append(by_loops(*moved, weight=WEIGHTS, temperature=0.5))
            expected = (ends[0] - ends[1]) / 2e-5
            assert abs(expected) > 1e-5
            assert found[side][index].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("subject", [[0], [2, 2, 2]])
def test_a_subject_alone_gives_exactly_zero(subject: list[int]):
    pair = [z[: len(subject)].requires_grad_() for z in inputs()]
    value = NTXent()(*pair, torch.tensor(subject))
    assert value.item() == 0
    for gradient in torch.autograd.grad(value, pair):
        assert torch.equal(gradient, torch.zeros(len(subject), 6))


def test_no_weight_at_all_gives_zero():
    pair = [z.requires_grad_() for z in inputs()]
    value = NTXent()(*pair, SUBJECTS, torch.zeros(5))
    assert value.item() == 0
    assert all(torch.equal(gradient, torch.zeros(5, 6)) for gradient in torch.autograd.grad(value, pair))


def test_a_tiny_temperature_overflows_nowhere():
    """Partners opposite, strangers alike: the largest logits there are, 100 and -100, whose exponentials overflow."""
    z = F.normalize(torch.ones(3, 4) + 1e-3 * torch.randn(3, 4), dim=1)
    pair = [z.requires_grad_(), (-z.detach()).requires_grad_()]
    value = NTXent(0.01)(*pair, torch.arange(3))
    assert value.item() == pytest.approx(by_loops(*(z.detach() for z in pair), torch.arange(3), None, 0.01), rel=1e-5)
    assert value.item() > 190
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, pair))


@pytest.mark.parametrize("temperature", [0.01, 0.2])
def test_float32_under_autocast(temperature: float):
    expected = NTXent(temperature)(*inputs(), SUBJECTS, WEIGHTS)
    pair = [z.bfloat16().requires_grad_() for z in inputs()]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(NTXent(temperature)(*inputs(), SUBJECTS, WEIGHTS), expected)
        value = NTXent(temperature)(*pair, SUBJECTS, WEIGHTS)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(by_loops(*pair, weight=WEIGHTS, temperature=temperature), rel=1e-4)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, pair))
