"""Terms of global contrastive pretraining against loops in float64."""

# ruff: noqa: F811

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from small_global import NAMES, PAIRS, SUBJECTS, batch, draw, embedded, fill, make, terms, unit  # noqa: F401
from torch import nn

from lssl.data.batch import PairBatch
from lssl.strategies.global_contrastive import BYOL, GlobalContrastive, MoCo, SimCLR, VICReg


def simclr_by_hand(z1: np.ndarray, z2: np.ndarray, shares: np.ndarray, tau: float = 0.2) -> float:
    z, who = unit(np.concatenate([z1, z2])), SUBJECTS * 2
    total = 0.0
    for i in range(2 * PAIRS):
        partner = (i + PAIRS) % (2 * PAIRS)
        others = [math.exp(z[i] @ z[j] / tau) for j in range(2 * PAIRS) if who[j] != who[i]]
        own = math.exp(z[i] @ z[partner] / tau)
        total -= shares[i % PAIRS] * math.log(own / (own + sum(others))) / (2 * shares.sum())
    return total


def moco_by_hand(q, k, queue, subject_ids, shares: np.ndarray, tau: float = 0.2) -> float:
    total = 0.0
    for queries, keys in ((unit(q[0]), unit(k[1])), (unit(q[1]), unit(k[0]))):
        for b in range(PAIRS):
            own = math.exp(queries[b] @ keys[b] / tau)
            rest = [
                math.exp(queries[b] @ n / tau)
                for n, w in zip(queue, subject_ids, strict=True)
                if w not in (-1, SUBJECTS[b])
            ]
            total -= shares[b] * math.log(own / (own + sum(rest))) / (2 * shares.sum())
    return total


def byol_by_hand(p, t, shares: np.ndarray) -> float:
    cosines = (unit(p[0]) * unit(t[1])).sum(1) + (unit(p[1]) * unit(t[0])).sum(1)
    return float(-0.5 * (shares * cosines).sum() / shares.sum())


def vicreg_by_hand(z1: np.ndarray, z2: np.ndarray, shares: np.ndarray) -> dict[str, float]:
    distance = sum(w * ((a - b) ** 2).mean() for w, a, b in zip(shares, z1, z2, strict=True)) / shares.sum()
    variance = covariance = 0.0
    for z in (z1, z2):
        c = np.cov(z.T)
        variance += 0.5 * np.maximum(0, 1 - np.sqrt(c.diagonal() + 1e-4)).mean()
        covariance += ((c**2).sum() - (c.diagonal() ** 2).sum()) / z.shape[1]
    return {"similarity": distance, "variance": variance, "covariance": covariance}


def by_hand(strategy: GlobalContrastive, name: str, batch: PairBatch, shares: np.ndarray) -> dict[str, float]:
    views = draw(strategy, batch)
    z = [embedded(strategy, view, "online") for view in views]
    if name == "vicreg":
        return vicreg_by_hand(*z, shares)
    if name == "simclr":
        return {"similarity": simclr_by_hand(*z, shares)}
    t = [embedded(strategy, view, "teacher") for view in views]
    if name == "moco":
        queue = strategy.objective.queue
        return {"similarity": moco_by_hand(z, t, queue.keys.double().numpy(), queue.subject_ids.tolist(), shares)}
    predictor = copy.deepcopy(strategy.objective.predictor).double()
    with torch.no_grad():
        p = [predictor(torch.from_numpy(rows)).numpy() for rows in z]
    return {"similarity": byol_by_hand(p, t, shares)}


INTERVALS = np.array([1.0, 2.5, 4.0, 0.0, np.inf])  # the last is unknown and weighs 0


@pytest.mark.parametrize("interval", [None, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_terms_by_hand(batch, name: str, interval: float | None):
    """In evaluation, where batch norm treats each row alone, as the loops do."""
    strategy = make(name, interval=interval).eval()
    if name == "moco":
        fill(strategy)
    found = terms(strategy, batch)
    expected = by_hand(strategy, name, batch, np.ones(PAIRS) if interval is None else np.exp(-INTERVALS / interval))
    assert set(found) == set(expected)
    for term, value in expected.items():
        assert found[term].item() == pytest.approx(value, rel=1e-4, abs=1e-6), term


def test_vicreg_weighs_25_25_1(batch):
    strategy = make("vicreg").eval()
    strategy.generator.manual_seed(0)
    loss, found = strategy._step(batch)
    expected = by_hand(strategy, "vicreg", batch, np.ones(PAIRS))
    total = 25 * expected["similarity"] + 25 * expected["variance"] + expected["covariance"]
    assert loss.item() == pytest.approx(total, rel=1e-4)
    assert set(found) == {"similarity", "variance", "covariance"}
    off = make("vicreg", loss_weights={"variance": 0.0, "covariance": 2.0})
    assert off.loss_weights == {"similarity": 25.0, "variance": 0.0, "covariance": 2.0}
    assert set(terms(off, batch)) == {"similarity", "covariance"}


@pytest.mark.parametrize("name", NAMES)
def test_defaults_of_the_papers(name: str):
    with torch.device("meta"):
        objective = {"simclr": SimCLR, "moco": MoCo, "byol": BYOL, "vicreg": VICReg}[name](12)
    widths = [(m.in_features, m.out_features) for m in objective.projector if isinstance(m, nn.Linear)]
    norm = next(m for m in objective.projector if "Norm" in type(m).__name__)
    assert isinstance(norm, nn.BatchNorm1d)
    assert (widths, objective.momentum) == {
        "simclr": ([(12, 2048), (2048, 128)], None),
        "moco": ([(12, 2048), (2048, 128)], (0.99, 0.999)),
        "byol": ([(12, 4096), (4096, 256)], (0.996, 1.0)),
        "vicreg": ([(12, 2048), (2048, 2048), (2048, 2048)], None),
    }[name]
    if name == "moco":
        assert objective.queue.keys.shape == (2048, 128)
    if name == "byol":
        assert [m.in_features for m in objective.predictor if isinstance(m, nn.Linear)] == [256, 4096]
