"""Retrieval across visits, by loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from lssl.metrics import CrossVisitRetrieval


def by_loops(embedding: np.ndarray, subject: Sequence[int], session: Sequence[int]) -> float:
    rows = {s: i for i, s in reversed(list(enumerate(session)))}  # the first time each visit was seen
    keep = sorted(rows.values())
    x = embedding[keep] - embedding[keep].mean(0)
    x = x / x.std(0, ddof=1)
    subjects, hits = [subject[i] for i in keep], []
    for i, own in enumerate(subjects):
        if subjects.count(own) > 1:
            cosines = [x[i] @ y / np.linalg.norm(x[i]) / np.linalg.norm(y) if j != i else -2 for j, y in enumerate(x)]
            hits.append(subjects[int(np.argmax(cosines))] == own)
    return float(np.mean(hits))


def visits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forty visits of sixteen subjects, four of them seen once; embeddings that find about half."""
    draw = torch.Generator().manual_seed(seed)
    subject = torch.cat([torch.arange(12).repeat_interleave(3), torch.arange(12, 16)])
    centre = torch.randn(16, 6, generator=draw)
    embedding = centre[subject] + 0.8 * torch.randn(40, 6, generator=draw)
    return embedding * torch.tensor([1.0, 1, 1, 1, 1, 1000]) + 50, subject, torch.randperm(40, generator=draw)


@pytest.mark.parametrize("seed", range(3))
def test_value_by_loops(seed: int):
    embedding, subject, session = visits(seed)
    metric = CrossVisitRetrieval()
    metric.update(embedding, subject, session)
    expected = by_loops(embedding.double().numpy(), subject.tolist(), session.tolist())
    assert 0.2 < expected < 0.9
    assert metric.compute().item() == pytest.approx(expected, abs=1e-6)


def test_updates_add_up_and_visits_seen_twice_count_once():
    embedding, subject, session = visits()
    whole, parts = CrossVisitRetrieval(), CrossVisitRetrieval()
    whole.update(embedding, subject, session)
    for part in torch.arange(40).split(7):
        parts.update(embedding[part], subject[part], session[part])
    again = torch.tensor([3, 3, 20, 39])
    parts.update(embedding[again], subject[again], session[again])
    assert parts.compute() == whole.compute()


def test_perfect_and_hopeless_embeddings():
    subject, session = torch.tensor([0, 0, 1, 1, 2]), torch.arange(5)
    good = torch.tensor([[1.0, 0], [1.1, 0], [0, 1], [0, 1.1], [-1, -1]])
    metric = CrossVisitRetrieval()
    metric.update(good, subject, session)
    assert metric.compute() == 1
    metric.reset()
    metric.update(good, torch.tensor([0, 1, 0, 1, 2]), session)
    assert metric.compute() == 0


def test_constant_embeddings_score_about_chance():
    subject = torch.arange(20).repeat_interleave(2)
    metric = CrossVisitRetrieval()
    metric.update(torch.full((40, 8), 3.0), subject, torch.arange(40))
    assert metric.compute().item() <= 3 / 40


def test_no_subject_with_two_visits_is_no_number():
    metric = CrossVisitRetrieval()
    metric.update(torch.randn(4, 3), torch.arange(4), torch.arange(4))
    assert math.isnan(metric.compute().item())
