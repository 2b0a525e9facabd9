"""Intervals against brute force and a closed form; pairing by seed and subject."""

import itertools

import numpy as np
import pandas as pd
import pytest

from lssl.benchmark.statistics import paired, two_way


def test_the_interval_is_that_of_all_draws_counted_out():
    difference = np.random.default_rng(1).normal(size=(2, 3)) + np.array([[0.0], [2.0]])
    seeds = list(itertools.product(range(2), repeat=2))
    subjects = list(itertools.product(range(3), repeat=3))
    every = [difference[np.ix_(s, n)].mean() for s in seeds for n in subjects]
    low, high = two_way(difference, draws=200_000)
    expected = np.quantile(every, [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(expected), abs=1e-9)


def test_variance_is_that_of_both_ways_in_closed_form():
    """For x = a_s + b_n the draws' variance is var(a) / S + var(b) / N (population variances)."""
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=40), 0.5 * draw.normal(size=60)
    low, high = two_way(a[:, None] + b[None, :], draws=40_000)
    assert (high - low) / (2 * 1.96) == pytest.approx(np.sqrt(a.var() / 40 + b.var() / 60), rel=0.03)
    narrow = two_way((a.mean() + b)[None, :].repeat(40, 0), draws=40_000)
    assert narrow[1] - narrow[0] < 0.5 * (high - low)  # an interval over subjects alone says less than it seems to


def test_one_seed_leaves_the_interval_over_subjects():
    b = np.random.default_rng(0).normal(size=50)
    low, high = two_way(b[None], draws=40_000)
    assert (high - low) / (2 * 1.96) == pytest.approx(b.std() / np.sqrt(50), rel=0.03)


def test_pairs_go_by_name_and_what_one_side_lacks_is_left_out():
    reference = pd.DataFrame({"a": [0.1, 0.2], "b": [0.3, 0.4], "c": [0.9, 0.9]}, index=[0, 1])
    scores = pd.DataFrame({"b": [0.6, 0.5, 9.0], "a": [0.3, 0.2, 9.0], "c": [0.9, np.nan, 9.0]}, index=[1, 0, 2])
    difference = paired(scores, reference)
    assert difference.mean == pytest.approx((0.1 + 0.2 + 0.1 + 0.2) / 4)
    assert (difference.seeds, difference.subjects) == (2, 2)
    assert difference.low <= difference.mean <= difference.high
    assert difference.above
    assert not paired(reference, scores).above
    assert paired(scores.loc[[2]], reference) is None
