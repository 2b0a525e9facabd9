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


GOOD = {
    "ncc_after": 0.9,
    "overlap": 0.95,
    "coverage": 1.0,
    "disagreement_mm": 0.2,
    "closure_mm": 0.1,
    "rotation_deg": 5.0,
    "mirror_gain": -0.2,
}


@pytest.mark.parametrize(
    ("change", "spacing", "words"),
    [
        ({}, (1, 1, 1), None),
        ({"ncc_after": 0.3}, (1, 1, 1), "correlates by 0.30 with the other visits: not aligned, or another contrast"),
        ({"ncc_after": np.nan}, (1, 1, 1), "not aligned"),
        ({"overlap": 0.5}, (1, 1, 1), "overlap by 0.50"),
        ({"coverage": 0.6}, (1, 1, 1), "field of view holds 60% of the head"),
        ({"disagreement_mm": 4.0}, (1, 1, 1), "disagree by 4.0 mm"),
        ({"closure_mm": 5.0}, (1, 1, 1), "three visits disagree"),
        ({"rotation_deg": 60.0}, (1, 1, 1), "turned by 60°"),
        ({"mirror_gain": 0.1}, (1, 1, 1), "left–right flipped"),
        ({}, (1, 1, 5.5), "slices of 5.5 mm"),
    ],
)
def test_flags(change, spacing, words):
    found = quality.flags(GOOD | change, np.array(spacing))
    assert len(found) == (0 if words is None else 1)
    assert words is None or words in found[0]


def test_a_single_visit_is_not_blamed():
    alone = GOOD | dict.fromkeys(("ncc_after", "overlap", "disagreement_mm", "mirror_gain"), float("nan"))
    assert quality.flags(alone, np.ones(3)) == []
