"""Intervals against mixed-model algebra written out and against simulation; pairing by seed, subject and cluster."""

import importlib.util

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT
from scipy import stats

from lssl.benchmark.statistics import METHOD, holm, paired, two_way

spec = importlib.util.spec_from_file_location("bench_intervals", ROOT / "benchmarks" / "bench_intervals.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def test_mean_squares_degrees_and_quantile_written_out():
    x = np.random.default_rng(1).normal(size=(3, 5)) + np.array([[0.0], [2.0], [1.0]]) + np.arange(5)
    seeds, subjects = x.shape
    ms_seed = sum(subjects * (x[s].mean() - x.mean()) ** 2 for s in range(seeds)) / (seeds - 1)
    ms_subject = sum(seeds * (x[:, n].mean() - x.mean()) ** 2 for n in range(subjects)) / (subjects - 1)
    rest = [(x[s, n] - x[s].mean() - x[:, n].mean() + x.mean()) ** 2 for s in range(seeds) for n in range(subjects)]
    ms_rest = sum(rest) / ((seeds - 1) * (subjects - 1))
    total = ms_seed + ms_subject - ms_rest
    assert total > max(ms_seed, ms_subject)
    spread = ms_seed**2 / (seeds - 1) + ms_subject**2 / (subjects - 1) + ms_rest**2 / ((seeds - 1) * (subjects - 1))
    degrees, error = total**2 / spread, np.sqrt(total / x.size)
    expected = stats.t.interval(0.95, degrees, x.mean(), error)
    low, high, p = two_way(x)
    assert (low, high) == pytest.approx(expected, rel=1e-12)
    assert p == pytest.approx(2 * stats.t.sf(x.mean() / error, degrees), rel=1e-9)


def test_without_residual_of_one_effect_it_is_the_t_interval_of_that_effect():
    b = np.random.default_rng(0).normal(size=12)
    for x in (np.tile(b, (4, 1)), np.tile(b[:, None], (1, 7))):
        low, high, p = two_way(x)
        assert (low, high) == pytest.approx(stats.t.interval(0.95, 11, b.mean(), stats.sem(b)), rel=1e-9)
        assert p == pytest.approx(stats.ttest_1samp(b, 0).pvalue, rel=1e-9)


@pytest.mark.parametrize("pattern", bench.PATTERNS, ids=str)
@pytest.mark.parametrize("seeds", [2, 5])
def test_intervals_cover(pattern, seeds):
    """A percentile bootstrap covers .6 to .9 here."""
    share = bench.coverage(4000, seeds, bench.PATTERNS[pattern])
    assert share > (0.90 if seeds == 2 else 0.935)
    assert share < 0.999


@pytest.mark.parametrize("pattern", bench.ROTATED, ids=str)
@pytest.mark.parametrize("train", [1, 3])
def test_intervals_cover_where_seeds_rotate_over_the_subjects(pattern, train):
    assert 0.94 < bench.rotated_coverage(4000, train, bench.ROTATED[pattern]) < 0.995


def test_with_holes_the_variance_is_that_of_effects_beyond_one_another():
    """Sums of squares by regressions on dummies, their expectations by putting in each effect alone."""
    x = bench.rotated(np.random.default_rng(3).normal(size=(6, 7)) + 3 * np.arange(6)[:, None] + np.arange(7), 2)
    x[1, 0] = np.nan  # not as regular, either
    place = np.argwhere(~np.isnan(x))
    dummies = [(place[:, [axis]] == np.arange(size)).astype(float) for axis, size in enumerate(x.shape)]

    def left(values, *columns):
        design = np.hstack(columns)
        return float(((values - design @ np.linalg.lstsq(design, values, rcond=None)[0]) ** 2).sum())

    def squares(values):
        rest = left(values, *dummies)
        return np.array([left(values, dummies[1]) - rest, left(values, dummies[0]) - rest, rest])

    freedom = np.array([5, 6, len(place) - 12])
    found = squares(x[~np.isnan(x)]) / freedom
    factors = [sum(squares(column)[axis] for column in dummies[axis].T) / freedom[axis] for axis in (0, 1)]
    shares = [sum(column.sum() ** 2 for column in name.T) / len(place) ** 2 for name in dummies]
    variances = [(found[axis] - found[2]) / factors[axis] for axis in (0, 1)]
    assert min(variances) > 0
    total = shares[0] * variances[0] + shares[1] * variances[1] + found[2] / len(place)
    weights = np.array([shares[0] / factors[0], shares[1] / factors[1], 0.0])
    weights[2] = 1 / len(place) - weights.sum()
    degrees = total**2 / ((weights * found) ** 2 / freedom).sum()
    low, high, _ = two_way(x)
    assert (low, high) == pytest.approx(stats.t.interval(0.95, degrees, np.nanmean(x), np.sqrt(total)), rel=1e-9)


def test_seeds_and_clusters_that_cannot_be_told_apart_give_no_interval():
    for x in (np.where(np.eye(4), 1.0, np.nan), np.kron(np.eye(2), np.ones((3, 3)))):
        assert np.isnan(two_way(np.where(x == 0, np.nan, x))).all()


def test_subjects_of_one_map_taken_for_independent_would_not_cover():
    pattern = bench.PATTERNS["12 subjects of 6 maps"]
    x = bench.draw(np.random.default_rng(0), 4000, 5, (0.0, *pattern[1:]))[:, 0]
    low, high, _ = two_way(x)
    assert ((low <= 0) & (high >= 0)).mean() < 0.9
    low, high, _ = two_way(bench.clustered(x, 2))
    assert ((low <= 0) & (high >= 0)).mean() > 0.94


def test_few_tables_have_a_false_bold_row():
    pattern = bench.PATTERNS["all alike, 10 subjects"]
    for seeds in (2, 5):
        corrected, alone = bench.false_bold(2000, seeds, pattern)
        assert corrected < 0.06
        assert alone > 1.4 * corrected


def test_a_residual_larger_than_both_effects_leaves_a_positive_variance():
    x = np.array([[1.0, -1.0], [-1.0, 1.0]]) + 3.0  # both effects are exactly 0
    low, high, p = two_way(x)
    assert (low, high, p) == pytest.approx((3.0, 3.0, 0.0))
    low, high, _ = two_way(np.array([[1.0, -1.0, 0.1], [-1.0, 1.0, 0.0]]) + 3.0)
    assert low < 3.0 < high
    low, high, p = two_way(np.zeros((3, 4)))
    assert (low, high, p) == (0, 0, 1)


def test_one_seed_or_one_cluster_gives_the_difference_alone():
    scores = pd.DataFrame({"a": [0.5], "b": [0.7]})
    difference = paired(scores, scores - 0.1)
    assert difference.mean == pytest.approx(0.1)
    assert np.isnan([difference.low, difference.high, difference.p]).all()
    assert str(difference) == "+0.100"
    assert difference.method == "none"
    two = pd.DataFrame({"a": [0.5, 0.6], "b": [0.7, 0.6]})
    assert np.isnan(paired(two, two * 0, {"a": "map", "b": "map"}).low)
    assert paired(two, two * 0).method == METHOD


def test_pairs_go_by_name_and_what_one_side_lacks_is_left_out():
    reference = pd.DataFrame({"a": [0.1, 0.2], "b": [0.3, 0.4], "c": [0.9, 0.9]}, index=[0, 1])
    scores = pd.DataFrame({"b": [0.6, 0.5, 9.0], "a": [0.3, 0.2, 9.0], "c": [0.9, np.nan, 9.0]}, index=[1, 0, 2])
    difference = paired(scores, reference)
    assert difference.mean == pytest.approx((0.1 + 0.2 + 0.1 + 0.2 + 0.0) / 5)  # nothing of c at seed 0, nor of seed 2
    assert (difference.seeds, difference.subjects, difference.clusters) == (2, 3, 3)
    assert difference.low <= difference.mean <= difference.high
    assert paired(scores.loc[[2]], reference) is None


def test_clusters_weigh_alike():
    scores = pd.DataFrame({"a1": [0.1, 0.3], "a2": [0.3, 0.5], "b1": [1.0, 1.2]})
    difference = paired(scores, scores * 0, {"a1": "a", "a2": "a"})
    assert difference.mean == pytest.approx((0.2 + 0.4 + 1.0 + 1.2) / 4)
    assert (difference.subjects, difference.clusters) == (3, 2)
    expected = two_way(np.array([[0.2, 1.0], [0.4, 1.2]]))
    assert (difference.low, difference.high) == pytest.approx((float(expected[0]), float(expected[1])))


def test_holm_against_the_definition():
    assert holm([0.01, 0.04, 0.03, np.nan]) == pytest.approx([0.03, 0.06, 0.06, np.nan], nan_ok=True)
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
