"""InfoNCE against a queue, by a loop in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lssl.losses import QueueInfoNCE

SUBJECTS = torch.tensor([3, 1, 0])
OWNERS = torch.tensor([1, 5, -1, 0, 3, -1, 5, 3])  # -1: not filled yet
WEIGHTS = torch.tensor([1.0, 0.0, 0.4])


def inputs(d: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and queue, none of them normalised."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, d, generator=draw) * 3 for n in (len(SUBJECTS), len(SUBJECTS), len(OWNERS)))


def loss(query, key, queue, weight=None, temperature: float = 0.2, subject=SUBJECTS, subject_ids=OWNERS) -> Tensor:
    return QueueInfoNCE(temperature)(query, key, subject, queue, subject_ids, weight)


def by_loops(query, key, queue, weight=None, temperature: float = 0.2) -> float:
    query, key, queue = ([row / row.norm() for row in rows.double()] for rows in (query, key, queue))
    weight = [1.0] * len(query) if weight is None else weight.tolist()
    total = 0.0
    for i, subject in enumerate(SUBJECTS.tolist()):
        positive = math.exp((query[i] @ key[i]).item() / temperature)
        negatives = 0.0
        for other, subject_ids in zip(queue, OWNERS.tolist(), strict=True):
            if subject_ids not in (-1, subject):
                negatives += math.exp((query[i] @ other).item() / temperature)
        total -= weight[i] * math.log(positive / (positive + negatives))
    return total / sum(weight)


@pytest.mark.parametrize("weight", [None, WEIGHTS])
@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_value_by_loops(temperature: float, weight: Tensor | None):
    expected = by_loops(*inputs(), weight, temperature)
    assert loss(*inputs(), weight, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_chance_is_the_logarithm_of_the_candidates():
    query, key, queue = (torch.ones_like(rows) for rows in inputs())
    expected = sum(math.log(1 + n) for n in (4, 5, 5)) / 3  # the queue's six keys without the subject's own
    assert loss(query, key, queue).item() == pytest.approx(expected, rel=1e-6)


def test_own_keys_and_empty_places_say_nothing():
    query, key, queue = inputs()
    first = torch.tensor([1.0, 0, 0])  # of subject 3
    value = loss(query, key, queue, first)
    for place in range(len(OWNERS)):
        changed = queue.clone()
        changed[place] = query[0]
        moved = loss(query, key, changed, first) - value
        assert (moved == 0) == (OWNERS[place] in (-1, 3)), place
    torch.testing.assert_close(loss(query, key, queue[OWNERS >= 0], subject_ids=OWNERS[OWNERS >= 0]), loss(*inputs()))


def test_gradient_is_that_of_the_formula_and_reaches_the_query_alone():
    query, key, queue = (rows.double().requires_grad_() for rows in inputs())
    loss(query, key, queue, WEIGHTS, 0.5).backward()
    assert key.grad is None
    assert queue.grad is None
    assert query.grad[1].abs().sum() == 0  # weight 0
    for index in ((0, 1), (2, 5)):
        ends = []
        for step in (1e-5, -1e-5):
            moved = query.detach().clone()
            moved[index] += step
            ends.append(by_loops(moved, key.detach(), queue.detach(), WEIGHTS, 0.5))
        expected = (ends[0] - ends[1]) / 2e-5
        assert abs(expected) > 1e-5
        assert query.grad[index].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("places", [0, 8])
def test_an_empty_queue_gives_exactly_zero(places: int):
    query, key, queue = inputs()
    query.requires_grad_()
    value = loss(query, key, torch.zeros_like(queue)[:places], subject_ids=torch.full((places,), -1))
    assert value.item() == 0
    assert torch.equal(torch.autograd.grad(value, query)[0], torch.zeros(3, 6))


def test_a_queue_of_ones_own_keys_alone_gives_exactly_zero():
    query, key, queue = inputs()
    value = loss(query[:1], key[:1], queue, subject=torch.tensor([3]), subject_ids=torch.full((8,), 3))
    assert value.item() == 0


def test_the_queue_may_change_before_the_backward_pass():
    query, key, queue = inputs()
    query.requires_grad_()
    expected = torch.autograd.grad(loss(query, key, queue), query)[0]
    value = loss(query, key, queue)
    queue[:] = 1.0
    key[:] = 1.0
    assert torch.equal(torch.autograd.grad(value, query)[0], expected)


@pytest.mark.parametrize("temperature", [0.01, 0.2])
def test_float32_under_autocast(temperature: float):
    expected = loss(*inputs(), WEIGHTS, temperature)
    rows = [r.bfloat16().requires_grad_() for r in inputs()]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(*inputs(), WEIGHTS, temperature), expected)
        value = loss(*rows, WEIGHTS, temperature)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(by_loops(*rows, WEIGHTS, temperature), rel=1e-4)
    assert torch.autograd.grad(value, rows[0])[0].isfinite().all()


def test_a_tiny_temperature_overflows_nowhere():
    """Keys opposite, strangers alike: the largest logits there are, 100 and -100."""
    query = F.normalize(torch.ones(3, 6), dim=1).requires_grad_()
    value = loss(query, -query.detach(), query.detach().repeat(3, 1)[:8], None, 0.01)
    expected = 200 + sum(math.log(n) for n in (4, 5, 5)) / 3
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert torch.autograd.grad(value, query)[0].isfinite().all()
