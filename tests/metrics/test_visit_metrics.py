"""Embeddings of whole visits: identity, interval, order and age, by loops and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from lssl.metrics import AgeR2, IdentityAUC, IntervalCorrelation, OrderAUC
from lssl.metrics.visits import auc, out_of_fold

Visits = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def visits(ageing: float = 1.0, identity: float = 1.0, seed: int = 0, subjects: int = 14) -> Visits:
    """Three visits per subject; embeddings hold the subject, one direction of ageing, and noise."""
    draw = torch.Generator().manual_seed(seed)
    subject = torch.arange(subjects).repeat_interleave(3)
    start = 40 + 30 * torch.rand(subjects, generator=draw)
    age = start[subject] + torch.tensor([0.0, 1.5, 4.0]).repeat(subjects) + torch.rand(3 * subjects, generator=draw)
    embedding = identity * torch.randn(subjects, 8, generator=draw)[subject]
    embedding = embedding + ageing * age[:, None] * torch.randn(8, generator=draw) / 10
    embedding = embedding + 0.3 * torch.randn(3 * subjects, 8, generator=draw)
    return embedding, subject, torch.randperm(3 * subjects, generator=draw), age


def of(metric, data: Visits, parts: int = 1) -> float:
    for index in torch.arange(len(data[0])).chunk(parts):
        metric.update(*(column[index] for column in (*data, data[3])))  # ages stand for times, too
    return metric.compute().item()


def standard(data: Visits) -> np.ndarray:
    rows = data[0].double().numpy()
    return (rows - rows.mean(0)) / rows.std(0, ddof=1)


def same_subject(data: Visits) -> list[tuple[int, int]]:
    subject, age = data[1].tolist(), data[3].tolist()
    n = range(len(subject))
    return [(i, j) for i in n for j in n if subject[i] == subject[j] and age[i] < age[j]]


def test_auc_by_loops_with_ties():
    one, two = torch.tensor([1.0, 2, 2, 5]), torch.tensor([0.0, 2, 2, 3, 5])
    expected = np.mean([(p > n) + 0.5 * (p == n) for p in one.tolist() for n in two.tolist()])
    assert auc(one, two).item() == pytest.approx(expected)
    assert math.isnan(auc(one[:0], two).item())
    assert math.isnan(auc(one, two[:0]).item())


def test_identity_by_loops():
    data = visits(identity=0.4)
    x, subject = standard(data), data[1].tolist()
    cosines = {True: [], False: []}
    for i in range(len(x)):
        for j in range(i):
            cosine = x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
            cosines[subject[i] == subject[j]].append(cosine)
    expected = np.mean([p > n for p in cosines[True] for n in cosines[False]])
    assert 0.55 < expected < 0.95
    assert of(IdentityAUC(), data) == pytest.approx(expected, abs=1e-6)


def test_interval_by_scipy():
    data = visits(ageing=5.0)
    x, age, pairs = standard(data), data[3].double().numpy(), same_subject(data)
    expected = spearmanr([np.linalg.norm(x[i] - x[j]) for i, j in pairs], [age[j] - age[i] for i, j in pairs])[0]
    assert 0.2 < expected < 0.95
    assert of(IntervalCorrelation(), data) == pytest.approx(expected, abs=1e-6)
    assert abs(of(IntervalCorrelation(), visits(ageing=0.0, subjects=100))) < 0.15


def leave_out(rows: np.ndarray, target: np.ndarray, owner: list[int], intercept: bool) -> np.ndarray:
    """Primal ridge of all but one fold of subjects, for that fold."""
    names, found = sorted(set(owner)), np.zeros(len(target))
    fold = np.array([names.index(name) % min(5, len(names)) for name in owner])
    for held_out in range(fold.max() + 1):
        fit, test = fold != held_out, fold == held_out
        centre, level = (rows[fit].mean(0), target[fit].mean()) if intercept else (0.0, 0.0)
        x = rows[fit] - centre
        penalty = (x**2).sum(1).mean()
        slope = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ (target[fit] - level))
        found[test] = (rows[test] - centre) @ slope + level
    return found


def test_age_by_primal_ridge():
    data = visits()
    age = data[3].double().numpy()
    residual = age - leave_out(standard(data), age, data[1].tolist(), intercept=True)
    expected = 1 - (residual**2).sum() / ((age - age.mean()) ** 2).sum()
    assert 0.2 < expected < 0.99
    assert of(AgeR2(), data) == pytest.approx(expected, abs=1e-5)


def test_age_of_the_subjects_own_other_visits_does_not_leak():
    """Embeddings that know nothing but who it is would tell the age, were the folds not by subject."""
    assert of(AgeR2(), visits(ageing=0.0, identity=5.0, subjects=40)) < 0.1


def test_order_by_primal_ridge():
    data = visits(ageing=0.3)
    x, pairs, subject = standard(data), same_subject(data), data[1].tolist()
    rows = np.array([x[j] - x[i] for i, j in pairs])
    score = leave_out(rows, np.ones(len(rows)), [subject[i] for i, _ in pairs], intercept=False)
    expected = np.mean([(p > -n) + 0.5 * (p == -n) for p in score for n in score])
    assert 0.55 < expected < 0.99
    assert of(OrderAUC(), data) == pytest.approx(expected, abs=1e-6)


def test_order_of_embeddings_without_ageing_is_a_coin():
    found = [of(OrderAUC(), visits(ageing=0.0, seed=seed, subjects=40)) for seed in range(5)]
    assert abs(np.mean(found) - 0.5) < 0.12
    assert of(OrderAUC(), visits(ageing=20.0)) > 0.99


@pytest.mark.parametrize("metric", [IdentityAUC, IntervalCorrelation, OrderAUC, AgeR2])
def test_updates_add_up_and_visits_seen_twice_count_once(metric):
    data = visits()
    twice = tuple(torch.cat([column, column[4:9]]) for column in data)
    assert of(metric(), twice, 6) == pytest.approx(of(metric(), data), abs=1e-9)


@pytest.mark.parametrize("metric", [IdentityAUC, IntervalCorrelation, OrderAUC, AgeR2])
def test_too_little_to_say_anything_is_no_number(metric):
    embedding, subject, session, age = visits()
    assert math.isnan(of(metric(), (embedding[:1], subject[:1], session[:1], age[:1])))
    if metric is not IdentityAUC:
        assert math.isnan(of(metric(), (embedding, subject, session, torch.full_like(age, float("nan")))))


def test_visits_of_unknown_age_are_left_out():
    embedding, subject, session, age = visits()
    age[5::3] = float("nan")
    known = ~age.isnan()
    whole = (embedding, subject, session, age)
    for metric in (OrderAUC, IntervalCorrelation):
        found = of(metric(), whole)
        assert math.isfinite(found)
        assert found != pytest.approx(of(metric(), visits()), abs=1e-6)
    assert known.sum() < len(age)


def test_a_constant_embedding_knows_nothing():
    embedding, subject, session, age = visits()
    data = (torch.full_like(embedding, 3.0), subject, session, age)
    assert of(IdentityAUC(), data) == 0.5
    assert math.isnan(of(IntervalCorrelation(), data))
    assert of(OrderAUC(), data) == 0.5
    assert of(AgeR2(), data) < 0.05


def test_folds_keep_subjects_apart():
    """A subject's own target, which its rows name exactly, must not help it."""
    owner = torch.arange(6).repeat_interleave(4)
    rows = torch.eye(6, dtype=torch.float64)[owner]
    target = torch.randn(6, dtype=torch.float64)[owner]
    found = out_of_fold(rows, target, owner, intercept=False, ridge=1e-9)
    assert found.abs().max() < 1e-6
