"""Scores by lesion against counts by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lssl.metrics.lesions import find_lesions, lesion_scores

SIZE = (16, 12, 10)


def mask(*boxes) -> np.ndarray:
    made = np.zeros(SIZE, dtype=bool)
    for box in boxes:
        made[tuple(slice(start, stop) for start, stop in box)] = True
    return made


CUBE = ((1, 3), (1, 3), (1, 3))  # 8 voxels
BAR = ((6, 16), (5, 6), (5, 6))  # 10 voxels
DOT = ((1, 2), (10, 11), (8, 9))  # 1 voxel


def test_corners_join_lesions_and_small_ones_are_none():
    corner = mask(CUBE, ((3, 4), (3, 4), (3, 4)), DOT)
    number, volumes = find_lesions(corner, 2.0)
    assert sorted(volumes) == [2.0, 18.0]
    assert number[1, 1, 1] == number[3, 3, 3] != number[1, 10, 8]
    number, volumes = find_lesions(corner, 2.0, min_volume=3.0)
    assert volumes.tolist() == [18.0]
    assert set(np.unique(number)) == {0, 1}
    assert number[1, 1, 1] == 1
    assert find_lesions(mask(DOT), 3.0, min_volume=3.0)[1].tolist() == [3.0]  # exactly that is enough


def test_counts_by_hand():
    truth = mask(CUBE, BAR)
    half = ((6, 11), (5, 6), (5, 6))  # 5 of the bar's 10 voxels
    false = ((12, 15), (1, 3), (1, 2))  # 6 voxels
    found = lesion_scores(mask(half, false), truth, voxel=2.0)
    assert (found.true_lesions, found.found, found.lesions, found.confirmed, found.false_lesions) == (2, 1, 2, 1, 1)
    assert (found.sensitivity, found.precision, found.f1) == (0.5, 0.5, 0.5)
    assert (found.true_volume, found.volume, found.false_volume) == (36.0, 22.0, 12.0)
    assert found.dice == pytest.approx(2 * 5 / (18 + 11))


@pytest.mark.parametrize(("voxels", "found"), [(0, 0), (1, 1)])
def test_a_tenth_of_a_lesion_is_enough(voxels, found):
    part = mask(((6, 6 + voxels), (5, 6), (5, 6)))
    assert lesion_scores(part, mask(BAR), 1.0, min_volume=0).found == found
    assert lesion_scores(part, mask(BAR), 1.0, min_volume=0, share=0.11).found == 0
    assert lesion_scores(mask(BAR), part, 1.0, min_volume=0).confirmed == found
    assert lesion_scores(mask(BAR), part, 1.0, min_volume=0, share=0.11).confirmed == 0


def test_one_prediction_may_find_two_lesions_and_two_may_find_one():
    pieces = mask(((6, 8), (5, 6), (5, 6)), ((13, 16), (5, 6), (5, 6)))
    whole = mask(BAR)
    one = lesion_scores(whole, pieces, 1.0, min_volume=0)
    assert (one.true_lesions, one.found, one.lesions, one.confirmed, one.f1) == (2, 2, 1, 1, 1.0)
    two = lesion_scores(pieces, whole, 1.0, min_volume=0)
    assert (two.true_lesions, two.found, two.lesions, two.confirmed) == (1, 1, 2, 2)


def test_everything_predicted_finds_all_and_precision_tells():
    truth = mask(DOT)
    found = lesion_scores(np.ones(SIZE, bool), truth, 3.0)
    assert (found.sensitivity, found.precision, found.f1) == (1.0, 0.0, 0.0)
    assert found.false_volume == 3.0 * math.prod(SIZE)


def test_without_true_lesions_all_predicted_ones_are_false():
    found = lesion_scores(mask(CUBE, DOT), mask(), 1.0)
    assert (found.true_lesions, found.false_lesions, found.false_volume, found.volume) == (0, 1, 8.0, 9.0)
    assert math.isnan(found.sensitivity)
    assert math.isnan(found.f1)
    assert math.isnan(found.dice)
    nothing = lesion_scores(mask(), mask(CUBE), 1.0)
    assert (nothing.f1, nothing.dice, nothing.false_volume) == (0.0, 0.0, 0.0)
    assert math.isnan(nothing.precision)


def test_small_components_count_for_nobody_but_cover_others():
    truth, speck = mask(BAR), mask(((6, 7), (5, 6), (5, 6)))
    found = lesion_scores(speck, truth, 1.0, min_volume=3.0)  # 1 mm³ predicted, a tenth of the lesion
    assert (found.found, found.lesions) == (1, 0)
    assert found.f1 == 0.0
