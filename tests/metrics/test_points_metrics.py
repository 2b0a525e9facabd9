"""What is asked of corresponding points, by loops over points."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lssl.metrics import Alignment, FeatureConsistency, MatchingAccuracy, Uniformity


def points(pairs: int = 3, k: int = 12, c: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    first = [torch.randn(k + n, c, generator=draw) + 2 for n in range(pairs)]
    return [(one, 0.5 * one + 0.6 * torch.randn(one.shape, generator=draw)) for one in first]


def unit(rows: torch.Tensor) -> np.ndarray:
    values = rows.double().numpy()
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def of(metric, parts):
    for part in parts:
        metric.update(*part)
    return metric.compute()


def test_alignment_by_loops():
    distances = [((x - y) ** 2).sum() for one, two in points() for x, y in zip(unit(one), unit(two), strict=True)]
    assert of(Alignment(), points()).item() == pytest.approx(np.mean(distances), rel=1e-6)


def test_uniformity_by_loops_over_pairs_within_an_update():
    values = [
        math.exp(-2 * ((x - y) ** 2).sum())
        for one, _ in points()
        for i, x in enumerate(unit(one))
        for j, y in enumerate(unit(one))
        if i != j
    ]
    found = of(Uniformity(), [(one,) for one, _ in points()]).item()
    assert found == pytest.approx(math.log(np.mean(values)), rel=1e-6)


def test_a_collapse_is_aligned_and_not_uniform():
    point = torch.randn(1, 6).expand(10, 6)
    assert of(Alignment(), [(point, 3 * point)]).item() == pytest.approx(0, abs=1e-6)
    assert of(Uniformity(), [(point,)]).item() == pytest.approx(0, abs=1e-6)
    sphere = torch.randn(500, 512)
    assert of(Uniformity(), [(sphere,)]).item() == pytest.approx(-4, abs=0.1)
    assert of(Alignment(), [(sphere, torch.randn(500, 512))]).item() == pytest.approx(2, abs=0.05)


def test_matching_by_loops():
    hits = []
    for one, two in points():
        for i, x in enumerate(unit(one)):
            hits.append(int(np.argmax([x @ y for y in unit(two)])) == i)
    assert 0.1 < np.mean(hits) < 0.9
    assert of(MatchingAccuracy(), points()).item() == pytest.approx(np.mean(hits), abs=1e-6)


def test_matching_looks_from_the_first_view_into_the_second():
    one, two = torch.eye(3), torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.1, 1, 0.1]])
    assert of(MatchingAccuracy(), [(one, two)]).item() == 1  # 3 finds 3, as no other has any of its third channel
    assert of(MatchingAccuracy(), [(two, one)]).item() == pytest.approx(2 / 3)  # but 3 looks like 2


def test_constant_features_match_as_chance_does():
    assert of(MatchingAccuracy(), [(torch.ones(10, 4), torch.ones(10, 4))] * 3).item() == pytest.approx(0.1)


def test_consistency_by_loops():
    same, shuffled = [], []
    for one, two in points():
        x, y = unit(one - one.double().mean(0)), unit(two - two.double().mean(0))
        for i in range(len(x)):
            for j in range(len(y)):
                (same if i == j else shuffled).append(x[i] @ y[j])
    found = of(FeatureConsistency(), points())
    assert np.mean(same) > 0.3 > np.mean(shuffled) + 0.3
    assert found["consistency"].item() == pytest.approx(np.mean(same), rel=1e-6)
    assert found["shuffled"].item() == pytest.approx(np.mean(shuffled), rel=1e-5)


def test_what_all_voxels_share_is_no_consistency():
    draw = torch.randn(2, 40, 6)
    found = of(FeatureConsistency(), [(draw[0] + 100, draw[1] + 100)])
    assert abs(found["consistency"].item()) < 0.2
    assert of(FeatureConsistency(), [(draw[0], draw[0] + 5)])["consistency"].item() == pytest.approx(1)


@pytest.mark.parametrize("metric", [Alignment, MatchingAccuracy, FeatureConsistency])
def test_no_points_change_nothing(metric):
    none = (torch.zeros(0, 6), torch.zeros(0, 6))
    with_none, without = of(metric(), [none, *points(), none]), of(metric(), points())
    assert with_none == without
