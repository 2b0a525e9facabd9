"""Whom MoCo and SimCLR compare with, and what the queue holds."""

# ruff: noqa: F811

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_global import PAIRS, SUBJECTS, WIDTH, batch, draw, embedded, fill, make, terms, unit  # noqa: F401
from torch import Tensor, nn

from lssl.strategies.global_contrastive import Objective

# --- negatives --------------------------------------------------------------------------------------------------------


def loss_of(objective: Objective, vectors: Tensor, pair: int) -> Tensor:
    """Loss of one pair alone; ``vectors (2, B, D)`` of both views, as predictions and as targets."""
    one = nn.functional.one_hot(torch.tensor(pair), PAIRS).float()
    views = vectors[0], vectors[1]
    return objective(views, views, torch.tensor(SUBJECTS), one)["similarity"]


def test_simclr_has_no_negatives_of_the_own_subject():
    objective = make("simclr").objective
    vectors = torch.randn(2, PAIRS, WIDTH, requires_grad=True)
    loss = loss_of(objective, vectors, 0)
    (gradient,) = torch.autograd.grad(loss, vectors)
    assert gradient[:, 2].abs().max() == 0
    assert all(gradient[view, pair].abs().max() > 1e-6 for view in (0, 1) for pair in (0, 1, 3, 4))
    for pair, same in ((2, True), (3, False)):
        moved = vectors.detach().clone()
        moved[:, pair] = torch.randn(2, WIDTH)
        assert (loss_of(objective, moved, 0) == loss).item() == same


@pytest.mark.parametrize("training", [True, False])
def test_moco_has_no_negatives_of_the_own_subject(training: bool):
    vectors = torch.randn(2, PAIRS, WIDTH)

    def loss(change: int | None = None, pair: int | None = None) -> Tensor:
        strategy = make("moco").train(training)
        torch.manual_seed(1)
        fill(strategy)
        queue, rows = strategy.objective.queue, vectors.clone()
        torch.manual_seed(2)
        if change is not None:
            queue.keys[queue.subject_ids == change] = torch.randn(WIDTH)
        if pair is not None:
            rows[:, pair] = torch.randn(2, WIDTH)
        return loss_of(strategy.objective, rows, 0)

    base = loss()
    assert base > 0.1
    assert loss(change=3) == base  # its own subject's earlier keys
    assert loss(change=-1) == base  # empty places
    assert loss(change=20) != base
    assert loss(pair=2) == base  # another pair of its subject, now
    assert loss(pair=0) != base


# --- the queue --------------------------------------------------------------------------------------------------------


def test_moco_queues_the_teachers_keys_of_both_views_after_the_loss(batch):
    strategy = make("moco")
    found = terms(strategy, batch)
    assert found["similarity"].item() == pytest.approx(0.0, abs=1e-6)  # the queue was empty: no negatives yet
    queue = strategy.objective.queue
    keys = np.concatenate([unit(embedded(strategy, view, "teacher")) for view in draw(strategy, batch)])
    np.testing.assert_allclose(queue.keys[: 2 * PAIRS].numpy(), keys, atol=1e-5)
    assert queue.subject_ids.tolist() == [*SUBJECTS, *SUBJECTS, *[-1] * 6]
    assert queue.pointer == 2 * PAIRS
    terms(strategy, batch)  # ten more into sixteen places: the oldest four are overwritten
    assert queue.pointer == 4
    np.testing.assert_allclose(queue.keys[10:].numpy(), keys[:6], atol=1e-5)
    np.testing.assert_allclose(queue.keys[:4].numpy(), keys[6:], atol=1e-5)
    assert queue.subject_ids.tolist() == [*(SUBJECTS * 2)[6:], *(SUBJECTS * 2)[4:], *(SUBJECTS * 2)[:6]]
    assert found["similarity"].requires_grad
    assert not queue.keys.requires_grad


def test_evaluation_leaves_the_queue_alone(batch):
    strategy = make("moco")
    fill(strategy)
    before = {name: value.clone() for name, value in strategy.objective.queue.state_dict().items()}
    strategy.eval()
    terms(strategy, batch)
    assert all(torch.equal(value, before[name]) for name, value in strategy.objective.queue.state_dict().items())
    strategy.train()
    terms(strategy, batch)
    assert not torch.equal(strategy.objective.queue.subject_ids, before["subject_ids"])
