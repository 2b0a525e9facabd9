"""LNE: its direction by loops, who is whose neighbour, and a planted ageing that trajectories come to share."""

from __future__ import annotations

import dataclasses
import math

import planted
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lssl.metrics.visits import auc
from lssl.strategies.neighbourhood_embedding import NeighbourhoodEmbedding
from lssl.utils.errors import InputError

NAN = float("nan")
TIMES = [[0.0, 2.0], [3.0, 1.5], [1.0, 1.0], [0.0, NAN], [0.0, 4.0], [2.0, 0.5], [0.0, 1.0], [5.0, 6.0]]
SUBJECTS = torch.tensor([0, 1, 2, 3, 0, 4, 5, 6])


def make(**options) -> NeighbourhoodEmbedding:
    small = {"latent": 16, "hidden": 32, "views": planted.views()}
    return NeighbourhoodEmbedding(planted.backbone(), "deep", **{**small, **options})


def batch_of(times: list, subjects: Tensor):
    return dataclasses.replace(planted.planted(len(times), 0), times=torch.tensor(times), subject=subjects)


def by_loops(one: Tensor, two: Tensor, times: list, subjects: list, neighbours: int) -> tuple[float, int]:
    """The direction's term, and the number of pairs in it."""
    pairs = []
    for a, b, (t1, t2), subject in zip(one.tolist(), two.tolist(), times, subjects, strict=True):
        if abs(t2 - t1) > 0:
            earlier, later = (a, b) if t2 > t1 else (b, a)
            pairs.append((subject, earlier, [(y - x) / abs(t2 - t1) for x, y in zip(earlier, later, strict=True)]))
    losses = []
    for subject, z, v in pairs:
        others = sorted((math.dist(z, z2), v2) for s2, z2, v2 in pairs if s2 != subject)
        if not others:
            continue
        sigma = others[-1][0] - others[0][0]
        weights = [math.exp(-d * d / (2 * sigma**2)) if sigma else 1.0 for d, _ in others[:neighbours]]
        h = [sum(w * v2[k] for w, (_, v2) in zip(weights, others, strict=False)) for k in range(len(v))]
        inner = sum(x * y for x, y in zip(v, h, strict=True))
        losses.append(1 - inner / math.hypot(*v) / math.hypot(*h))
    return sum(losses) / max(len(losses), 1), len(losses)


@pytest.mark.parametrize("neighbours", [1, 2, 3, 50])
def test_direction_by_loops(neighbours):
    strategy, batch = make(neighbours=neighbours), batch_of(TIMES, SUBJECTS)
    first, second = strategy.views(batch, strategy.generator)
    found = strategy.terms(first, second, batch)["direction"].item()
    maps = strategy.autoencoder(strategy.backbone(torch.cat([first.image, second.image]), ["deep"])["deep"])
    one, two = maps.detach().double().flatten(2).mean(2).chunk(2)
    expected, used = by_loops(one, two, TIMES, SUBJECTS.tolist(), neighbours)
    assert used == 6
    assert found == pytest.approx(expected, rel=1e-4)
    assert strategy.logged["skipped"].item() == pytest.approx(1 - used / 8)


@pytest.mark.parametrize(
    ("subjects", "used"), [([0, 1, 2, 3, 4, 4, 4, 4], 6), ([0, 0, 0, 1, 0, 0, 0, 2], 6), ([0] * 8, 0)]
)
def test_a_subject_is_not_its_own_neighbour_and_few_neighbours_give_finite_gradients(subjects, used):
    """In the second case, all but one pair have one neighbour; in the third, none has any."""
    strategy, batch = make(loss_weights={"reconstruction": 0.0}), batch_of(TIMES, torch.tensor(subjects))
    terms = strategy.terms(*strategy.views(batch, strategy.generator), batch)
    assert strategy.logged["skipped"].item() == pytest.approx(1 - used / 8)
    terms["direction"].backward()
    gradients = [p.grad for p in strategy.parameters() if p.requires_grad]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients) == bool(used)


def test_a_batch_of_one_pair_is_refused():
    strategy = make()
    with pytest.raises(InputError, match=r"a batch holds 1: raise data\.init_args.batch_size"):
        strategy.losses(planted.planted(1, 0))


def test_trajectories_come_to_share_the_planted_ageing_and_those_of_shuffled_times_do_not():
    """Cosine of new subjects' changes with the mean change; and its sign, from the changes of the training pairs."""
    cosines = {}
    for control in (False, True):
        strategy = planted.train(make(), 60, control)

        def change(one: Tensor, two: Tensor) -> tuple[Tensor, ...]:
            z1, z2 = (strategy.autoencoder.vectors(strategy.latent_map(image)) for image in (one, two))  # noqa: B023
            return (F.normalize(z2 - z1, dim=1),)

        (known,), _ = planted.held_out(strategy, change, seed=0)
        (new,), _ = planted.held_out(strategy, change)
        score = new @ F.normalize(known.mean(0), dim=0)
        cosines[control] = score.mean().item()
        if not control:
            assert auc(score, -score).item() > 0.95
    assert cosines[False] > 0.75
    assert cosines[True] < cosines[False] - 0.3, cosines
