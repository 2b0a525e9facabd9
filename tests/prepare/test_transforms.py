"""Averages of maps: the right half, no favourite, no contradiction."""

from __future__ import annotations

import numpy as np
import pytest
from scans import rigid

from lssl.prepare.transforms import (
    between,
    closure,
    displacement,
    exponential,
    half_way,
    logarithm,
    motion,
    right_turns,
    rotation_degrees,
)

POINTS = np.random.default_rng(0).uniform(-80, 80, (50, 3))


def test_logarithm_and_exponential_undo_each_other():
    matrix = rigid(40, 30) @ np.diag([1.02, 0.97, 1.01, 1.0])
    np.testing.assert_allclose(exponential(logarithm(matrix)), matrix, atol=1e-10)
    assert exponential(logarithm(matrix))[3].tolist() == [0, 0, 0, 1]


def test_two_visits_share_the_motion_equally():
    motion = rigid(14, 20)
    first, second = half_way(2, {(0, 1): motion})
    np.testing.assert_allclose(second @ np.linalg.inv(first), motion, atol=1e-9)
    assert rotation_degrees(first) == pytest.approx(7, abs=1e-6)
    assert rotation_degrees(second) == pytest.approx(7, abs=1e-6)
    np.testing.assert_allclose(second @ first, np.eye(4), atol=1e-9)


def test_motion_is_counted_from_visit_to_visit_not_half_way():
    moved = rigid(14, 20)
    wanted = {"rotation_deg": 14.0, "moved_mm": displacement(moved, np.eye(4), POINTS), "volume_factor": 1.0}
    assert motion(half_way(2, {(0, 1): moved}), 0, POINTS) == pytest.approx(wanted, abs=1e-5)
    still = [np.eye(4), np.eye(4), moved]
    assert motion(still, 1, POINTS) == pytest.approx(wanted, abs=1e-5)  # the visit that differs most counts
    assert motion([rigid(9, 5)], 0, POINTS) == pytest.approx({"rotation_deg": 0, "moved_mm": 0, "volume_factor": 1})
    larger = half_way(2, {(0, 1): moved @ np.diag([1.02, 1.01, 1.0, 1.0])})  # at the second visit
    factors = [motion(larger, visit, POINTS)["volume_factor"] for visit in (0, 1)]
    assert factors[1] / factors[0] == pytest.approx(1.02 * 1.01)
    assert factors[1] * factors[0] == pytest.approx(1)


def test_a_visit_laid_down_by_right_angles_does_not_tilt_the_frame():
    """Half of a wrong header's quarter turn is nobody's orientation; the rest of the motion is shared as ever."""
    turns = right_turns()
    assert len({turn.tobytes() for turn in turns}) == 24
    np.testing.assert_array_equal(turns[0], np.eye(4))
    moved, wanted = rigid(14, 20), half_way(2, {(0, 1): rigid(14, 20)})
    for header in turns:
        first, second = half_way(2, {(0, 1): header @ moved})
        np.testing.assert_allclose(first, wanted[0], atol=1e-9)
        np.testing.assert_allclose(second, header @ wanted[1], atol=1e-9)
    quarter = turns[-1]
    pairs = {(0, 1): np.linalg.inv(quarter), (1, 2): np.eye(4), (0, 2): np.linalg.inv(quarter)}
    maps = half_way(3, pairs)  # the first is the odd one out
    np.testing.assert_allclose(maps, [quarter, np.eye(4), np.eye(4)], atol=1e-9)


def test_the_order_of_visits_is_of_no_account():
    motion = rigid(14, 20)
    one, two = half_way(2, {(0, 1): motion})
    swapped = half_way(2, {(0, 1): np.linalg.inv(motion)})
    np.testing.assert_allclose(swapped[0], two, atol=1e-9)
    np.testing.assert_allclose(swapped[1], one, atol=1e-9)


def test_where_the_origin_lies_is_of_no_account():
    motion, shift = rigid(14, 20), np.eye(4)
    shift[:3, 3] = (120, -40, 300)
    moved = half_way(2, {(0, 1): shift @ motion @ np.linalg.inv(shift)})[0]
    np.testing.assert_allclose(moved, shift @ half_way(2, {(0, 1): motion})[0] @ np.linalg.inv(shift), atol=1e-7)


def measured(number: int, error_mm: float) -> tuple[list[np.ndarray], dict[tuple[int, int], np.ndarray]]:
    truth = [rigid(5 + visit, 8 + visit, visit) for visit in range(number)]
    pairs = {}
    for i in range(number):
        for j in range(i + 1, number):
            pairs[i, j] = rigid(error_mm / 2, error_mm, 10 * i + j) @ truth[j] @ np.linalg.inv(truth[i])
    return truth, pairs


@pytest.mark.parametrize("number", [3, 5])
def test_several_visits_agree_with_each_other_and_with_what_was_measured(number):
    truth, pairs = measured(number, 0.0)
    maps = half_way(number, pairs)
    for (i, j), matrix in pairs.items():
        assert displacement(maps[j] @ np.linalg.inv(maps[i]), matrix, POINTS) < 1e-6
    np.testing.assert_allclose(sum(logarithm(matrix) for matrix in maps), 0, atol=1e-7)
    _, noisy = measured(number, 1.0)
    assert closure(noisy, POINTS) > 0.5
    solved = half_way(number, noisy)
    # the compromise errs less than a single measurement does
    errors = [
        displacement(solved[j] @ np.linalg.inv(solved[i]), truth[j] @ np.linalg.inv(truth[i]), POINTS) for i, j in noisy
    ]
    alone = [displacement(noisy[i, j], truth[j] @ np.linalg.inv(truth[i]), POINTS) for i, j in noisy]
    assert np.mean(errors) < 0.85 * np.mean(alone)
    exact = {(i, j): solved[j] @ np.linalg.inv(solved[i]) for i, j in noisy}
    assert closure(exact, POINTS) < 1e-6


def test_missing_pairs_are_bridged():
    truth, pairs = measured(4, 0.0)
    chain = {(i, i + 1): pairs[i, i + 1] for i in range(3)}
    maps = half_way(4, chain)
    assert displacement(maps[3] @ np.linalg.inv(maps[0]), truth[3] @ np.linalg.inv(truth[0]), POINTS) < 1e-6


def test_a_single_visit_stays():
    np.testing.assert_array_equal(half_way(1, {})[0], np.eye(4))


def test_both_directions_are_averaged():
    forward, backward = rigid(10, 5), np.linalg.inv(rigid(10.4, 5.2))
    mean = between(forward, backward)
    np.testing.assert_allclose(between(backward, forward), np.linalg.inv(mean), atol=1e-9)
    assert displacement(mean, forward, POINTS) == pytest.approx(
        displacement(mean, np.linalg.inv(backward), POINTS), rel=1e-2
    )
