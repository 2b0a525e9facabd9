"""Scores over subjects: by hand, against other computations, and the coverage of their intervals."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from lssl.prediction.scores import (
    auc_interval,
    by_subject,
    classification_scores,
    mean_interval,
    regression_scores,
    wilson,
)

NAN = float("nan")


def test_a_subjects_truth_is_its_last_and_only_its_samples_count():
    rows = [("b", [1.0], 0.0), ("b", [3.0], 1.0), ("b", [5.0], 1.0), ("a", [2.0], NAN), ("a", [4.0], NAN)]
    found = by_subject(pd.DataFrame(rows, columns=["subject", "output", "truth"]))
    assert found["subject"].tolist() == ["b", "a"]
    assert found["output"].tolist() == [[4.0], [3.0]]
    assert found["truth"].tolist()[0] == 1.0
    assert math.isnan(found["truth"][1])
    assert found["samples"].tolist() == [2, 2]
    rows = [("a", [1.0], 4.0), ("a", [3.0], 8.0), ("a", [9.0], NAN)]
    number = by_subject(pd.DataFrame(rows, columns=["subject", "output", "truth"]), average=True).iloc[0]
    assert (number["output"], number["truth"], number["samples"]) == ([2.0], 6.0, 2)


def variance(a, m, n):
    """Hanley and McNeil, as Newcombe writes it."""
    k = (m + n) / 2 - 1
    return a * (1 - a) * (1 + k * (1 - a) / (2 - a) + k * a / (1 + a)) / (m * n)


@pytest.mark.parametrize(("auc", "m", "n"), [(0.8, 20, 30), (0.5, 12, 12), (1.0, 15, 10), (0.0, 8, 9), (0.97, 40, 5)])
def test_the_limits_of_an_auc_are_where_its_distance_is_1_96_errors(auc, m, n):
    low, high = auc_interval(auc, m, n)
    grid = np.linspace(1e-6, 1 - 1e-6, 200_001)
    inside = grid[abs(auc - grid) <= 1.959964 * np.sqrt(variance(grid, m, n))]
    assert low == pytest.approx(0 if auc == 0 else inside.min(), abs=2e-5)
    assert high == pytest.approx(1 if auc == 1 else inside.max(), abs=2e-5)


def test_auc_intervals_cover_what_they_say():
    """Two normal distributions with 12 and 18 subjects; 400 draws."""
    draw, shift = np.random.default_rng(0), 1.2
    truth, hits = stats.norm.cdf(shift / math.sqrt(2)), 0
    for _ in range(400):
        one, other = draw.normal(shift, 1, 12), draw.normal(0, 1, 18)
        low, high = auc_interval(float((one[:, None] > other).mean()), 12, 18)
        hits += low <= truth <= high
    assert 0.92 < hits / 400 < 0.985


def test_wilson_and_t():
    for hits, number in ((7, 10), (10, 10), (0, 6)):
        own = stats.binomtest(hits, number).proportion_ci(method="wilson")
        assert wilson(hits / number, number) == pytest.approx((own.low, own.high))
    values = np.random.default_rng(0).random(9)
    own = stats.t.interval(0.95, 8, values.mean(), stats.sem(values))
    assert mean_interval(values, [str(place) for place in range(9)]) == pytest.approx(own)
    twins = np.repeat(values, 2)  # two subjects of each family who are alike are one piece of evidence
    assert mean_interval(twins, [str(place // 2) for place in range(18)]) == pytest.approx(own)


def test_figures_of_two_classes_by_hand():
    probability = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]]).double()
    truth, decided = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    share = torch.tensor([0.75, 0.25]).double()
    found = classification_scores(probability, decided, truth, ["CN", "AD"], share, list("abcd"))
    figures = {figure.metric: figure for figure in found}
    assert figures["auc"].value == pytest.approx(3 / 4)
    assert figures["recall_CN"].value == 0.5
    assert figures["recall_AD"].value == 1
    assert figures["balanced_accuracy"].value == pytest.approx(0.75)
    assert figures["brier"].value == pytest.approx((0.1**2 + 0.6**2 + 0.7**2 + 0.2**2) / 4)
    assert figures["brier_constant"].value == pytest.approx((2 * 0.25**2 + 2 * 0.75**2) / 4)
    assert figures["ece"].value == pytest.approx((0.1 + 0.6 + 0.7 + 0.2) / 4, abs=1e-6)  # four bins of one subject
    low, high = figures["balanced_accuracy"].low, figures["balanced_accuracy"].high
    one, other = wilson(0.5, 2), wilson(1.0, 2)
    assert low == pytest.approx(0.75 - math.hypot(0.5 - one[0], 1 - other[0]) / 2)
    assert high == pytest.approx(0.75 + math.hypot(one[1] - 0.5, 0) / 2)
    related = classification_scores(probability, decided, truth, ["CN", "AD"], share, list("aabb"))
    assert related[0].high - related[0].low > figures["auc"].high - figures["auc"].low


def test_three_classes_and_a_class_that_nobody_has():
    draw = torch.Generator().manual_seed(0)
    probability = torch.rand(30, 3, generator=draw).double().softmax(1)
    truth = torch.arange(30) % 2
    found = classification_scores(
        probability, probability.argmax(1), truth, ["a", "b", "c"], torch.full((3,), 1 / 3).double(), list(range(30))
    )
    names = [figure.metric for figure in found]
    assert names[:3] == ["auc", "auc_a", "auc_b"]
    assert "recall_c" not in names
    one_hot = torch.nn.functional.one_hot(truth, 3)
    brier = next(figure for figure in found if figure.metric == "brier")
    assert brier.value == pytest.approx(((probability - one_hot) ** 2).sum(1).mean().item())


def test_figures_of_numbers():
    predicted, truth = np.array([1.0, 2.0, 4.0]), np.array([1.5, 2.0, 3.0])
    figures = {figure.metric: figure for figure in regression_scores(predicted, truth, 2.0, list("abc"))}
    assert figures["mae"].value == pytest.approx(0.5)
    assert figures["mae_constant"].value == pytest.approx(0.5)
    assert figures["r2"].value == pytest.approx(1 - 1.25 / ((truth - truth.mean()) ** 2).sum())
    assert figures["r"].value == pytest.approx(np.corrcoef(predicted, truth)[0, 1])
    one = regression_scores(predicted[:1], truth[:1], 2.0, ["a"])
    assert [figure.metric for figure in one] == ["mae", "mae_constant"]
