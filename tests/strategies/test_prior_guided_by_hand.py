"""Terms of prior-guided local pretraining against loops over voxels, 4×4 matrices and scipy in float64."""

# ruff: noqa: F811

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from helpers import few
from scipy.ndimage import map_coordinates
from small_prior_guided import SIZE, TAPS, batch, draw, make, seen, terms  # noqa: F401
from torch import Tensor, nn

from lssl.networks.backbone import Backbone
from lssl.strategies.prior_guided_local import PriorGuidedLocal
from lssl.views.sampler import View


def key(strategy: PriorGuidedLocal, tap: str) -> str:
    """Heads are named after their taps somehow, and stand in their order."""
    return list(strategy.projectors.heads)[list(strategy.tap_weights).index(tap)]


class ByHand:
    """One direction of one tap for one sample, in float64: Ω, and projections of this view and of the other there."""

    def __init__(self, strategy: PriorGuidedLocal, tap: str, view: View, other: View, b: int, border: float = 0.0):
        self.strategy, self.tap, self.key = copy.deepcopy(strategy).double(), tap, key(strategy, tap)
        stride, offset = TAPS[tap]
        shift = np.array([[stride, 0, 0, offset], [0, stride, 0, offset], [0, 0, stride, offset], [0, 0, 0, 1.0]])
        g1, g2 = (v.affine[b].numpy() @ shift for v in (view, other))
        back = np.linalg.inv(g2)
        self.online = self.projected(self.strategy.backbone, self.strategy.projectors.heads, view.image[b])
        whose = self.strategy.teacher
        if whose is None:
            target = self.projected(self.strategy.backbone, self.strategy.projectors.heads, other.image[b])
        else:
            target = self.projected(whose["backbone"], whose["projectors"].heads, other.image[b])
        size, theirs = self.online.shape[1:], target.shape[1:]
        self.voxels, self.places, at = [], [], []
        for index in itertools.product(*map(range, size)):
            place = g1 @ [*index, 1]
            there = (back @ place)[:3]
            if (
                all(border <= i <= n - 1 - border for i, n in zip(index, size, strict=True))
                and all(border <= i <= n - 1 - border for i, n in zip(there, theirs, strict=True))
                and self.contains(view, b, place, strategy.foreground)
                and self.contains(other, b, place, strategy.foreground)
            ):
                self.voxels.append(index)
                self.places.append(place[:3])
                at.append(there)
        self.q = np.array([self.online[:, i, j, k] for i, j, k in self.voxels])
        self.t = np.stack([map_coordinates(c, np.array(at).T, order=1) for c in target], 1) if at else None

    def projected(self, backbone: Backbone, heads: nn.ModuleDict, image: Tensor) -> np.ndarray:
        """``(D, d, h, w)``: the head on every voxel's features, one after the other."""
        layers = list(backbone.network)[: 1 if self.tap == "fine" else 3]
        with torch.no_grad():
            found = nn.Sequential(*layers)(image[None].double())[0]
            out = np.empty((7, *found.shape[1:]))
            for i, j, k in itertools.product(*map(range, found.shape[1:])):
                out[:, i, j, k] = heads[self.key](found[None, :, i, j, k])[0].numpy()
        return out

    def predicted(self) -> np.ndarray:
        with torch.no_grad():
            return self.strategy.predictors.heads[self.key](torch.from_numpy(self.q)).numpy()

    @staticmethod
    def contains(view: View, b: int, place: np.ndarray, foreground: bool) -> bool:
        own = (np.linalg.inv(view.affine[b].numpy()) @ place)[:3]
        source = (np.linalg.inv(view.source_affine[b].numpy()) @ place)[:3]
        if not all(-0.5 <= i <= n - 0.5 for i, n in zip(own, view.size, strict=True)):
            return False
        if not all(0 <= i <= n - 1 for i, n in zip(source, view.source_extent[b].tolist(), strict=True)):
            return False
        return not foreground or view.source_foreground[b][tuple(int(i) for i in source.round())].item()


def directions(strategy, tap: str, first: View, second: View, border: float = 0.0) -> list[list[ByHand]]:
    """Both directions, each with its samples."""
    both = (first, second), (second, first)
    return [[ByHand(strategy, tap, *views, b, border) for b in range(len(first.image))] for views in both]


def flat(sides: list[list[ByHand]]) -> list[ByHand]:
    return [side for samples in sides for side in samples]


def cosine_by_hand(side: ByHand) -> float:
    p, t = side.predicted(), side.t
    return float(np.mean([2 - 2 * x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(p, t, strict=True)]))


def distance_by_hand(side: ByHand) -> float:
    return float(np.mean((side.q - side.t) ** 2))


BY_HAND = {"cosine": cosine_by_hand, "vicreg": distance_by_hand}


@pytest.mark.parametrize("foreground", [True, False])
@pytest.mark.parametrize("tap", few(sorted(TAPS), 1))  # the fine one has eight times as many voxels to go through
@pytest.mark.parametrize("objective", ["cosine", "vicreg"])
def test_similarity_by_hand(batch, objective: str, tap: str, foreground: bool):
    strategy = make(objective=objective, taps=[tap], foreground=foreground)
    found = terms(strategy, batch)["similarity"]
    sides = directions(strategy, tap, *draw(strategy, batch))
    counts = [len(side.voxels) for side in flat(sides)]
    assert 0 < min(counts) < max(counts) < side_voxels(tap)
    expected = np.mean([np.mean([BY_HAND[objective](side) for side in samples]) for samples in sides])
    assert found.item() == pytest.approx(expected, rel=1e-4)


def side_voxels(tap: str) -> int:
    return int(np.prod([n // TAPS[tap][0] for n in SIZE]))


def as_voxels(side: ByHand, places: Tensor) -> list[int]:
    """Row of Ω that each place is."""
    known = {tuple(np.round(place, 4)): row for row, place in enumerate(side.places)}
    return [known[tuple(np.round(place, 4))] for place in places.double().numpy()]


@pytest.mark.parametrize("exclusion", few([12.0, 3.0], 1))
def test_info_nce_by_hand(batch, seen, exclusion: float):
    """As many draws as voxels, hence each of Ω as often as any other, or once more."""
    strategy = make(objective="info_nce", samples=10_000, exclusion=exclusion, temperature=0.2)
    calls = seen(strategy.objective.loss)
    found = terms(strategy, batch)["similarity"]
    total, excluded = [], 0
    sides = directions(strategy, "bottleneck", *draw(strategy, batch))
    for samples, (q, t, places, weight) in zip(sides, zip(*calls[0], strict=True), strict=True):
        assert weight.tolist() == [1, 1]
        for b, side in enumerate(samples):
            rows = as_voxels(side, places[b])
            times = np.bincount(rows, minlength=len(side.voxels))
            assert times.min() >= 1
            assert times.max() - times.min() <= 1
            np.testing.assert_allclose(q[b].detach().numpy(), side.q[rows], atol=1e-4)
            np.testing.assert_allclose(t[b].detach().numpy(), side.t[rows], atol=1e-4)
            x, k, at = (np.array(v)[rows] for v in (side.q, side.t, side.places))
            x, k = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, k))
            logits = x @ k.T / 0.2
            losses = []
            for i in range(len(rows)):
                far = [j for j in range(len(rows)) if np.linalg.norm(at[i] - at[j]) > exclusion]
                excluded += len(rows) - 1 - len(far)
                for row in (logits, logits.T):
                    losses.append(np.log(np.exp(row[i, i]) + np.exp(row[i, far]).sum()) - row[i, i])
            total.append(np.mean(losses))
    assert excluded > 0
    assert found.item() == pytest.approx(np.mean(total), rel=1e-4)


def test_variance_and_covariance_are_of_projections_at_valid_voxels(batch, seen):
    strategy = make(objective="vicreg", samples=10_000)
    calls = seen(strategy.variance)
    found = terms(strategy, batch)
    sides = directions(strategy, "bottleneck", *draw(strategy, batch))
    variance = covariance = 0.0
    ((*views, used1, used2),) = calls
    assert used1.min() == used2.min() == 1
    for rows, samples in zip(views, sides, strict=True):
        omega = np.concatenate([side.q for side in samples])
        rows = rows.detach().double().numpy()
        nearest = np.abs(rows[:, None] - omega[None]).max(-1)
        assert nearest.min(1).max() < 1e-4  # none from outside
        assert nearest.min(0).max() < 1e-4  # and all of Ω
        c = np.cov(rows.T)
        variance += 0.5 * np.maximum(0, 1 - np.sqrt(c.diagonal() + 1e-4)).mean()
        covariance += ((c**2).sum() - (c.diagonal() ** 2).sum()) / 7
    assert found["variance"].item() == pytest.approx(variance, rel=1e-4)
    assert found["covariance"].item() == pytest.approx(covariance, rel=1e-4)


@pytest.mark.parametrize("objective", few(["vicreg", "cosine"], 1))
def test_taps_are_weighted(batch, objective: str):
    strategy = make(objective=objective, taps=list(TAPS), tap_weights={"fine": 1.0, "bottleneck": 3.0})
    found = terms(strategy, batch)["similarity"].item()
    sides = {tap: flat(directions(strategy, tap, *draw(strategy, batch))) for tap in TAPS}
    each = {tap: np.mean([BY_HAND[objective](side) for side in samples]) for tap, samples in sides.items()}
    assert abs(each["fine"] - each["bottleneck"]) > 1e-3
    assert found == pytest.approx(0.25 * each["fine"] + 0.75 * each["bottleneck"], rel=1e-4)
    assert make(taps=list(TAPS)).tap_weights == {"fine": 0.5, "bottleneck": 0.5}
    alone = make(taps=list(TAPS), tap_weights={"bottleneck": 2.0})
    assert alone.tap_weights == {"bottleneck": 1.0}
    assert alone.projectors.taps == alone.predictors.taps == ("bottleneck",)


@pytest.mark.parametrize("border", [0.5, 1.0])
def test_border_keeps_away_from_both_lattices(batch, border: float):
    strategy = make(border=border)
    found = terms(strategy, batch)["similarity"]
    sides = directions(strategy, "bottleneck", *draw(strategy, batch), border)
    without = directions(strategy, "bottleneck", *draw(strategy, batch))
    assert 0 < sum(len(s.voxels) for s in flat(sides)) < sum(len(s.voxels) for s in flat(without))
    expected = np.mean([np.mean([cosine_by_hand(side) for side in samples]) for samples in sides])
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_a_sample_with_fewer_voxels_than_fewest_is_left_out_of_its_direction(batch):
    sides = directions(make(), "bottleneck", *draw(make(), batch))
    counts = sorted(len(side.voxels) for side in flat(sides))
    assert counts[0] < counts[1]
    for fewest, left in ((counts[0], 0), (counts[0] + 1, 1)):
        strategy = make(min_points=fewest)
        found = terms(strategy, batch)["similarity"]
        kept = [[side for side in samples if len(side.voxels) >= fewest] for samples in sides]
        expected = np.mean([np.mean([cosine_by_hand(side) for side in samples]) for samples in kept])
        assert found.item() == pytest.approx(expected, rel=1e-4)
        assert strategy.logged["skipped"].item() == pytest.approx(left / 4)
