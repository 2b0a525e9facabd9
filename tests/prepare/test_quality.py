"""Quality figures: known values, and the doubts they raise."""

from __future__ import annotations

import numpy as np
import pytest

from lssl.prepare import quality

DRAW = np.random.default_rng(0)
IMAGE = DRAW.random((12, 13, 14)).astype(np.float32)
ALL = np.ones(IMAGE.shape, bool)


def test_correlation():
    assert quality.ncc(IMAGE, 3 * IMAGE + 7, ALL) == pytest.approx(1)
    assert quality.ncc(IMAGE, -IMAGE, ALL) == pytest.approx(-1)
    assert abs(quality.ncc(IMAGE, DRAW.random(IMAGE.shape), ALL)) < 0.1
    assert np.isnan(quality.ncc(IMAGE, np.ones(IMAGE.shape), ALL))


def test_mutual_information_sees_what_correlation_does_not():
    folded = np.abs(IMAGE - 0.5)
    assert abs(quality.ncc(IMAGE, folded, ALL)) < 0.1
    assert quality.mutual_information(IMAGE, folded, ALL) > 1
    assert quality.mutual_information(IMAGE, DRAW.permutation(folded.ravel()).reshape(folded.shape), ALL) < 0.4
    halves = (np.median(IMAGE) < IMAGE).astype(float)
    assert quality.mutual_information(halves, halves, ALL) == pytest.approx(np.log(2), abs=1e-3)


def test_overlap():
    one, two = np.zeros(8, bool), np.zeros(8, bool)
    one[:4], two[2:6] = True, True
    assert quality.overlap(one, two) == pytest.approx(0.5)


def test_laplacian_energy_of_a_wave():
    """A cosine of frequency w along one axis: (2 - 2 cos w)², whatever its height."""
    x = np.arange(60)
    wave = 5 * np.broadcast_to(np.cos(2 * np.pi * x / 10)[:, None, None], (60, 8, 8))
    inside = np.zeros(wave.shape, bool)
    inside[10:50, 2:-2, 2:-2] = True
    assert quality.laplacian_energy(wave, inside) == pytest.approx((2 - 2 * np.cos(2 * np.pi / 10)) ** 2, rel=1e-6)


def test_few_voxels_are_not_scored_and_blame_nobody_else():
    """27 hot voxels in one of three visits, which agree by accident; the other two are judged by each other."""
    head = np.zeros((20, 20, 20), bool)
    head[2:-2, 2:-2, 2:-2] = True
    hot = np.zeros_like(head)
    hot[9:12, 9:12, 9:12] = True
    image = DRAW.random(head.shape)
    found = quality.pairwise([image, 2 * image, image], [head, head, hot])
    assert [figures["ncc"] for figures in found[:2]] == pytest.approx([1, 1])
    assert np.isnan(found[2]["ncc"])
    assert np.isnan(found[2]["mi"])
    assert [figures["common"] for figures in found] == [(16**3 + 27) / 2, (16**3 + 27) / 2, 27]
    assert found[2]["overlap"] == pytest.approx(54 / (16**3 + 27))
    single = quality.pairwise([image], [head])[0]
    assert all(np.isnan(value) for value in single.values())


GOOD = {
    "ncc_after": 0.9,
    "overlap": 0.95,
    "coverage": 1.0,
    "disagreement_mm": 0.2,
    "closure_mm": 0.1,
    "rotation_deg": 5.0,
    "same_person": 0.5,
    "common_ml": 1400.0,
    "foreground_ml": 1500.0,
}


@pytest.mark.parametrize(
    ("change", "spacing", "words"),
    [
        ({}, (1, 1, 1), None),
        ({"ncc_after": 0.3}, (1, 1, 1), "correlates by 0.30 with the other visits: not aligned, another contrast or"),
        ({"ncc_after": np.nan}, (1, 1, 1), "not aligned"),
        ({"overlap": 0.5}, (1, 1, 1), "overlap by 0.50"),
        ({"coverage": 0.6}, (1, 1, 1), "field of view holds 60% of the head"),
        ({"disagreement_mm": 4.0}, (1, 1, 1), "disagree by 4.0 mm"),
        ({"closure_mm": 5.0}, (1, 1, 1), "three visits disagree"),
        ({"rotation_deg": 60.0}, (1, 1, 1), "turned by 60°"),
        ({"same_person": -0.4}, (1, 1, 1), "left–right flipped"),
        ({"same_person": 0.08}, (1, 1, 1), "perhaps another person than the other visits, or noise"),
        ({"same_person": 0.08, "ncc_after": 0.3}, (1, 1, 1), "another person"),
        ({"same_person": np.nan}, (1, 1, 1), None),  # too coarse to tell
        ({"common_ml": 0.2, "ncc_after": np.nan}, (1, 1, 1), "foreground shares 0.2 ml with the other visits: too few"),
        ({"foreground_ml": 0.2}, (1, 1, 1), "foreground holds 0.2 ml"),
        ({}, (1, 1, 5.5), "slices of 5.5 mm"),
    ],
)
def test_flags(change, spacing, words):
    found = quality.flags(GOOD | change, np.array(spacing))
    assert len(found) == (0 if words is None else 1)
    assert words is None or words in found[0]


def test_a_single_visit_is_not_blamed():
    alone = GOOD | dict.fromkeys(("ncc_after", "overlap", "disagreement_mm", "same_person", "common_ml"), float("nan"))
    assert quality.flags(alone, np.ones(3)) == []
