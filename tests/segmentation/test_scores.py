"""Scores of subjects against brute force, and what degenerate predictions score."""

import itertools

import pandas as pd
import pytest
import torch

from lssl.segmentation.report import averages
from lssl.segmentation.scores import SegmentedVisit, dice_scores, mean_dice, score_subject
from lssl.views import geometry as geo

NAMES = ("a", "b", "c")
SPACING = (1.0, 2.0, 1.5)


def visit(predicted, truth, session="ses-1", time=0.0, shift=(0.0, 0.0, 0.0), ordered=True):
    affine = geo.translation(torch.tensor(shift).double()) @ geo.scaling(torch.tensor(SPACING).double())
    return SegmentedVisit(session, float("nan"), time, ordered, affine, torch.zeros(predicted.shape), predicted, truth)


def box(low, high, number, size=(10, 9, 8)):
    label = torch.zeros(size, dtype=torch.long)
    label[low[0] : high[0], low[1] : high[1], low[2] : high[2]] = number
    return label


def value(rows, metric, structure="a", session=None):
    (found,) = [
        r.value for r in rows if r.metric == metric and r.structure == structure and session in (None, r.session)
    ]
    return found


def surface_points(mask):
    """Voxels with a neighbour (of six) outside, in mm."""
    points = []
    for index in mask.nonzero().tolist():
        for axis, step in itertools.product(range(3), (-1, 1)):
            near = list(index)
            near[axis] += step
            if not (0 <= near[axis] < mask.shape[axis]) or not mask[tuple(near)]:
                points.append([i * s for i, s in zip(index, SPACING, strict=True)])
                break
    return torch.tensor(points)


def test_dice_by_counting(generator):
    mine, true = torch.randint(0, 4, (2, 6, 5, 4), generator=generator)
    true[:2] = -1
    found = dice_scores(mine, true, 5)
    for number in range(4):
        both = own = its = 0
        for m, t in zip(mine.flatten().tolist(), true.flatten().tolist(), strict=True):
            if t >= 0:
                both, own, its = both + (m == t == number), own + (m == number), its + (t == number)
        assert found[number].item() == pytest.approx(2 * both / (own + its))
    assert found[4].isnan()


def test_distances_against_brute_force():
    mine, true = box((1, 1, 1), (6, 5, 6), 1), box((3, 2, 1), (8, 7, 5), 1)
    rows = score_subject("s", [visit(mine, true)], NAMES)
    apart = torch.cdist(surface_points(mine == 1), surface_points(true == 1))
    one, other = apart.amin(1), apart.amin(0)
    assert value(rows, "hd95") == pytest.approx(max(one.quantile(0.95).item(), other.quantile(0.95).item()), rel=1e-4)
    assert value(rows, "hd95") > torch.cat([one, other]).quantile(0.95).item() + 0.1  # the pooled percentile is another
    assert value(rows, "asd") == pytest.approx(torch.cat([one, other]).mean().item(), rel=1e-4)
    assert value(rows, "volume") == pytest.approx(5 * 4 * 5 * 3.0)
    assert value(rows, "true_volume") == pytest.approx(5 * 5 * 4 * 3.0)
    assert value(rows, "missed") == 0


def test_a_structure_that_is_not_found_is_no_distance_but_missed():
    true = box((1, 1, 1), (4, 4, 4), 1) + box((6, 6, 6), (8, 8, 8), 2)
    rows = score_subject("s", [visit(box((1, 1, 1), (4, 4, 4), 1), true)], NAMES)
    assert (value(rows, "dice", "b"), value(rows, "missed", "b")) == (0, 1)
    assert not [row for row in rows if row.structure == "b" and row.metric in ("hd95", "asd")]
    assert not [row for row in rows if row.structure == "c" and row.metric in ("dice", "missed")]  # truth has none
    assert value(rows, "dice") == 1


def test_visits_against_one_another():
    """Growth from 27 to 36 voxels in two years, seen; and the same prediction twice, which agrees and is wrong."""
    first, second = box((1, 1, 1), (4, 4, 4), 1), box((1, 1, 1), (5, 4, 4), 1)
    seen = [visit(first, first), visit(second, second, "ses-2", 2.0)]
    rows = score_subject("s", seen, NAMES)
    assert value(rows, "aspc", session="ses-1/ses-2") == value(rows, "true_aspc") == pytest.approx(100 * 9 / 31.5)
    assert value(rows, "stcs") == value(rows, "true_stcs") == pytest.approx(2 * 27 / 63)
    assert value(rows, "trajectory_error") == pytest.approx(0.0)
    copied = [visit(first, first), visit(first, second, "ses-2", 2.0)]
    rows = score_subject("s", copied, NAMES)
    assert (value(rows, "aspc"), value(rows, "stcs"), value(rows, "reversal_rate")) == (0, 1, 0)
    assert value(rows, "trajectory_error") == pytest.approx(100 * 9 / 31.5 / 2)  # ages are unknown: times suffice


def test_visits_without_time_or_order_give_no_rate_and_no_reversal():
    first, second = box((1, 1, 1), (4, 4, 4), 1), box((1, 1, 1), (5, 4, 4), 1)
    unknown = [visit(first, first, time=float("nan")), visit(second, second, "ses-2", float("nan"))]
    metrics = {row.metric for row in score_subject("s", unknown, NAMES)}
    assert "trajectory_error" not in metrics
    assert {"reversal_rate", "aspc", "stcs"} <= metrics
    unordered = [visit(first, first, ordered=False), visit(second, second, "ses-2", ordered=False)]
    assert "reversal_rate" not in {row.metric for row in score_subject("s", unordered, NAMES)}


def test_visits_are_compared_where_they_lie():
    """The second visit's grid begins two voxels later: the same place has another index."""
    first = box((3, 2, 2), (7, 5, 5), 1)
    second = torch.zeros_like(first)
    second[:-2] = first[2:]
    rows = score_subject("s", [visit(first, None), visit(second, None, "ses-2", shift=(2.0, 0, 0))], NAMES)
    assert value(rows, "stcs") == 1
    assert value(rows, "aspc") == 0
    assert {row.metric for row in rows} == {"volume", "stcs", "aspc"}  # no truth, no scores against it


def test_averages_give_every_subject_one_voice():
    rows = [("x", "1", "a", "dice", 0.2), ("x", "2", "a", "dice", 0.4), ("y", "1", "a", "dice", 0.9)]
    rows += [("y", "1", "b", "dice", 0.5), ("y", "1", "a", "volume", 900.0)]
    table = averages(pd.DataFrame(rows, columns=["subject", "session", "structure", "metric", "value"]))
    assert table["dice"].to_dict() == pytest.approx({"a": 0.6, "b": 0.5, "mean": 0.55})
    assert list(table.columns) == ["dice"]


def test_mean_dice_weighs_subjects_and_structures_alike():
    """Subject 0 is seen three times; structure 2 is in one visit alone, and one visit shows nothing."""
    nan = float("nan")
    dice = {0: (0, [0.2, nan]), 1: (0, [0.4, nan]), 2: (0, [0.6, 0.9]), 3: (1, [0.8, nan]), 4: (2, [nan, nan])}
    assert mean_dice(dice) == pytest.approx(((0.4 + 0.8) / 2 + 0.9) / 2)
    assert mean_dice({0: (0, [nan])}) == mean_dice({}) == 0


def test_volumes_of_a_partly_annotated_visit_are_not_known():
    truth = box((2, 2, 2), (4, 4, 4), 1)
    truth[5] = -1
    found = {row.metric: row.value for row in score_subject("s", [visit(truth.clamp_min(0), truth)], ["one"])}
    assert found["dice"] == 1
    assert found["volume"] == 8 * 3
    assert "true_volume" not in found
