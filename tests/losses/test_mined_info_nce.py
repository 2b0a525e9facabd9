"""MinedInfoNCE against loops over anchors in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from lssl.losses import MinedInfoNCE
from lssl.utils.errors import InputError

B, K, M, D = 2, 5, 40, 6


@pytest.fixture
def case():
    draw = torch.Generator().manual_seed(1)
    anchor, own, candidates = (normalize(torch.randn(B, n, D, generator=draw), dim=-1) for n in (K, K, M))
    allowed = torch.rand(B, K, M, generator=draw) < 0.7
    return {"anchor": anchor, "own": own, "candidates": candidates, "allowed": allowed}


def unit(rows) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def brute(case, temperature, hard=None, ranking=None, others=None, weight=None) -> float:
    """All of the hard ones are used; ``others`` are rows and which samples may use them."""
    anchor, own, candidates = (unit(case[name]) for name in ("anchor", "own", "candidates"))
    means = []
    for b in range(B):
        values = []
        for k in range(K):
            allowed = [m for m in range(M) if case["allowed"][b, k, m]]
            rank = {
                m: float(ranking[b, k, m]) if ranking is not None else anchor[b, k] @ candidates[b, m] for m in allowed
            }
            chosen = sorted(allowed, key=lambda m: -rank[m])[:hard]
            negatives = [candidates[b, m] for m in chosen]
            if others is not None:
                negatives += [row for row, yes in zip(unit(others[0]), others[1][b], strict=True) if yes]
            positive = math.exp(anchor[b, k] @ own[b, k] / temperature)
            rest = sum(math.exp(anchor[b, k] @ row / temperature) for row in negatives)
            values.append(-math.log(positive / (positive + rest)))
        means.append(np.mean(values))
    weight = np.ones(B) if weight is None else np.asarray(weight)
    return float((weight * means).sum() / weight.sum())


@pytest.mark.parametrize("temperature", [0.5, 0.07])
@pytest.mark.parametrize("hard", [4, 12, M])
def test_hard_negatives(case, temperature, hard, generator):
    loss = MinedInfoNCE(temperature, hard, hard)(**case, generator=generator)
    assert loss.item() == pytest.approx(brute(case, temperature, hard), rel=1e-5)


def test_ranking_of_ones_own_others_and_weight(case, generator):
    draw = torch.Generator().manual_seed(2)
    ranking = torch.randn(B, K, M, generator=draw)
    others = (
        normalize(torch.randn(7, D, generator=draw), dim=-1),
        torch.tensor([[True, False] * 3 + [True], [False] * 7]),
    )
    extra = {"ranking": ranking, "cross_subject_negatives": others, "weight": torch.tensor([1.0, 0.25])}
    loss = MinedInfoNCE(0.2, 6, 6)(**case, generator=generator, **extra)
    assert loss.item() == pytest.approx(brute(case, 0.2, 6, ranking, others, extra["weight"]), rel=1e-5)


def test_diverse_ones_are_a_random_part_of_the_hard_ones(case, generator):
    loss = MinedInfoNCE(0.5, hard=12, diverse=4)
    ranking = torch.randn(B, K, M, generator=generator)
    top = ranking.masked_fill(~case["allowed"], -math.inf).topk(12).indices
    seen = torch.zeros(B, K, M)
    for _ in range(60):
        index, used = loss.mine(ranking, case["allowed"], generator)
        assert index.shape == (B, K, 4)
        assert used.all()
        assert (index[..., None] == top[:, :, None]).any(-1).all()
        assert all(len(set(row.tolist())) == 4 for row in index.flatten(0, 1))
        seen.scatter_add_(2, index, torch.ones(index.shape))
    assert (seen.gather(2, top) > 5).all()  # 20 expected of each; none is preferred


def test_excluded_ones_never_count_even_when_all_others_are_worse(generator):
    anchor = torch.tensor([[[1.0, 0.0]]])
    candidates = normalize(
        torch.tensor([[[1.0, 0.01], [-1.0, 0.0], [-1.0, 0.1]]]), dim=-1
    )  # the first is excluded, the rest negative
    allowed = torch.tensor([[[False, True, True]]])
    value = MinedInfoNCE(0.5, hard=1, diverse=1)(anchor, anchor, candidates, allowed, generator).item()
    cosine = -1 / math.sqrt(1.01)  # a multiplied mask would have picked the excluded one, with similarity 0
    assert value == pytest.approx(math.log1p(math.exp((cosine - 1) / 0.5)), rel=1e-5)


def test_an_anchor_without_negatives_gives_an_exact_zero_and_finite_gradients(case, generator):
    case["allowed"][:] = False
    anchor = case["anchor"].requires_grad_()
    loss = MinedInfoNCE(0.5, 8, 4)(**case, generator=generator)
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(anchor.grad).all()


def test_gradient_is_that_of_float64(case, generator):
    inputs = {name: case[name].double().requires_grad_() for name in ("anchor", "own", "candidates")}
    normal = {name: normalize(value, dim=-1) for name, value in inputs.items()}
    similarity = normal["anchor"] @ normal["candidates"].mT
    logits = torch.cat(
        [(normal["anchor"] * normal["own"]).sum(-1, keepdim=True), similarity.masked_fill(~case["allowed"], -math.inf)],
        2,
    )
    cross_entropy((logits / 0.3).flatten(0, 1), torch.zeros(B * K, dtype=torch.long)).backward()
    ours = {name: case[name].clone().requires_grad_() for name in inputs}
    rows = {name: normalize(value, dim=-1) for name, value in ours.items()}
    MinedInfoNCE(0.3, M, M)(**rows, allowed=case["allowed"], generator=generator).backward()
    for name, value in inputs.items():
        torch.testing.assert_close(ours[name].grad.double(), value.grad, rtol=1e-4, atol=1e-6)


def test_float32_under_autocast(case, generator):
    plain = MinedInfoNCE(0.1, M, M)(**case, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        assert MinedInfoNCE(0.1, M, M)(**case, generator=generator) == plain


@pytest.mark.parametrize("name", ["temperature", "hard", "diverse"])
def test_bad_input(name):
    with pytest.raises(InputError, match=name):
        MinedInfoNCE(**{name: 0})
