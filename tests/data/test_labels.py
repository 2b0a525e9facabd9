"""What session labels say about order and time."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lssl.data.labels import label_keys, label_time, label_years, visit_ranks

IN_ORDER = [
    "baselineYear1Arm1 2YearFollowUpYArm1 4YearFollowUpYArm1",
    "baselineyear1arm1 2yearfollowupyarm1 4yearfollowupyarm1",
    "ses-pre ses-post",
    "preop intraop postop",
    "PreSurgery PostSurgery1 PostSurgery2",
    "test retest",
    "bl M06 M12",
    "BL m006 m012 m120",
    "sc m06 m12",
    "screening baseline week4 week12",
    "sc bl m06",
    "Baseline Year1 Year2 Year10",
    "baseline followup1 followup2",
    "baseline FollowUp",
    "initial final",
    "bl m6 final",
    "pre6months pre3months post",
    "pre post3months post12months",
    "y1 y1m6 y2",
    "1y6m 2y",
    "V1M0 V3M6 V2M12",
    "d0129 d0860",
    "20150302 20170101",
    "0w 6w 12w",
    "acute subacute chronic",
]


@pytest.mark.parametrize("labels", IN_ORDER)
def test_words_and_numbers_with_units_are_in_order(labels):
    right = labels.split()
    mixed = random.Random(0).sample(right, len(right))
    keys, how = label_keys(mixed)
    assert how == "words"
    assert [label for _, label in sorted(zip(keys, mixed, strict=True))] == right


@pytest.mark.parametrize("labels", ["01 02 10", "1 2", "wave1 wave2", "MR1 MR2 MR10", "tp0 tp1", "V01 V02"])
def test_plain_numbers_are_in_order_but_told_apart(labels):
    right = labels.split()
    keys, how = label_keys(right[::-1])
    assert how == "numbers"
    assert [label for _, label in sorted(zip(keys, right[::-1], strict=True))] == right


@pytest.mark.parametrize(
    "labels",
    ["a b", "left right", "bl m06 post", "bl m12 fu", "01 wave2", "baseline 02", "bl baseline", "1a 2b", "contrast x"],
)
def test_other_labels_have_no_order(labels):
    assert label_keys(labels.split()) == ([], "")


@pytest.mark.parametrize(
    ("labels", "years"),
    [
        ("bl M06 M12", [0, 0.5, 1]),
        ("sc m06", [0, 0.5]),
        ("sc bl m06", [np.nan, 0, 0.5]),
        ("pre post", [np.nan, np.nan]),
        ("01 02", [np.nan, np.nan]),
        ("w1 w2 w3", [7 / 365.25, 14 / 365.25, 21 / 365.25]),
        ("2YearFollowUpYArm1 baselineYear1Arm1", [2, 0]),
        ("20160101 20170101", [0, 366 / 365.25]),
        ("bl 1p5y", [0, 1.5]),
    ],
)
def test_years_of_labels(labels, years):
    np.testing.assert_allclose(label_years(labels.split()), years)


def test_letters_that_are_no_units_leave_the_number():
    assert np.isnan(label_years(["w1", "w2"], frozenset("w"))).all()
    assert label_keys(["w2", "w1"], frozenset("w")) == ([(0, 2), (0, 1)], "numbers")
    assert label_time("ses-week2").letter == ""


def test_ranks_come_from_times_then_labels_and_are_unknown_where_these_disagree():
    subject = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 5, 5])
    session = ["b", "a", "post", "pre", "x", "y", "02", "01", "z", "pre", "mid", "post"]
    time = np.array([1, 0] + [np.nan] * 7 + [2, np.nan, 0])
    rank, known = visit_ranks(subject, session, time)
    np.testing.assert_array_equal(rank, [1, 0, 1, 0, np.nan, np.nan, 1, 0, 0, np.nan, np.nan, np.nan])
    assert known.tolist() == ["time"] * 2 + ["words"] * 2 + [""] * 2 + ["numbers"] * 2 + ["time"] + [""] * 3
