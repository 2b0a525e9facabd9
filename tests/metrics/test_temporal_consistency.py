"""Consistency of two segmentations, by loops over voxels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lssl.metrics import TemporalConsistency
from lssl.utils.errors import InputError


def by_loops(brought: torch.Tensor, other: torch.Tensor, classes: int) -> list[float]:
    result = []
    for name in range(classes):
        scores = []
        for a, b in zip(brought, other, strict=True):
            pairs = [(x, y) for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True) if min(x, y) >= 0]
            one, two = (
                {i for i, p in enumerate(pairs) if p[0] == name},
                {i for i, p in enumerate(pairs) if p[1] == name},
            )
            if one or two:
                scores.append(2 * len(one & two) / (len(one) + len(two)))
        result.append(float(np.mean(scores)) if scores else math.nan)
    return result


def labels() -> tuple[torch.Tensor, torch.Tensor]:
    """Class 3 is in one sample of one visit only, class 4 in none; sample 2 lacks class 2; a rim is outside."""
    draw = torch.Generator().manual_seed(0)
    other = torch.randint(0, 3, (3, 5, 6, 7), generator=draw)
    brought = torch.where(torch.rand(other.shape, generator=draw) < 0.7, other, other.roll(1, 0))
    brought[0, 2, 2, 2:4] = 3
    brought[2], other[2] = brought[2].clamp_max(1), other[2].clamp_max(1)
    brought[:, 0] = -1
    other[1, :, :, -1] = -1
    return brought, other


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.uint8])
def test_value_by_loops(dtype):
    brought, other = labels()
    if dtype == torch.uint8:
        brought, other = brought.clamp_min(0), other.clamp_min(0)
    metric = TemporalConsistency(5)
    metric.update(brought[:2].to(dtype), other[:2].to(dtype))
    metric.update(brought[2:].to(dtype), other[2:].to(dtype))
    expected = by_loops(brought, other, 5)
    np.testing.assert_allclose(metric.compute().numpy(), expected, rtol=1e-6)
    assert 0.4 < expected[1] < 0.95
    assert expected[3] == 0
    assert math.isnan(expected[4])


def test_what_lies_outside_changes_nothing():
    brought, other = labels()
    scores = []
    for noise in (0, 1):
        metric = TemporalConsistency(5)
        changed = torch.where(brought < 0, noise, other)  # where the one is outside, the other may be anything
        metric.update(brought, changed)
        scores.append(metric.compute())
    assert torch.equal(*(score.nan_to_num(-1) for score in scores))


def test_a_copy_of_the_other_visit_wins_it():
    _, other = labels()
    metric = TemporalConsistency(4)
    metric.update(other, other)
    assert metric.compute()[:3].tolist() == [1, 1, 1]


def test_a_class_beyond_those_asked_for_is_refused():
    with pytest.raises(InputError, match="holds class 3, but consistency was asked of classes 0 to 2"):
        TemporalConsistency(3).update(*labels())
