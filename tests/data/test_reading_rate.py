"""The rate of reading said at start: of the time that reading takes, and of nothing that reading changes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lssl.data import loading
from lssl.data.loading import PairDataset, reading_rate
from lssl.data.times import _per_subject
from lssl.utils.errors import InputError


class Disk:
    """Each pair takes so many seconds by a clock that only reading moves."""

    def __init__(self, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.now, self.reads = seconds, 0.0, 0
        monkeypatch.setattr(loading, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(loading.os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)

    def __call__(self, rows, size, seed):
        self.now += self.seconds
        self.reads += 1

    def dataset(self, visits: int = 2) -> PairDataset:
        nothing = np.zeros(4 * visits)
        return PairDataset(self, np.arange(4 * visits).reshape(4, visits), nothing, nothing, nothing)


def test_the_rate_is_that_of_the_workers_that_have_a_processor(monkeypatch):
    disk = Disk(0.04, monkeypatch)
    text = reading_rate(disk.dataset(), 2, 8)
    assert disk.reads == 2
    assert "takes 40 ms, so 8 workers on 3 processors read about 75 pairs a second" in text
    assert "steps of 2 pairs shorter than 26.7 ms would wait" in text
    assert "a step of 1 pair waits" in reading_rate(disk.dataset(), 1, 0)
    assert reading_rate(disk.dataset(3), 2, 0).startswith(
        "Reading a series of 3 visits takes 40 ms, and a step of 2 series of 3 visits waits"
    )


def test_one_slow_pair_is_enough_and_a_damaged_one_is_left_to_the_loader(monkeypatch):
    disk = Disk(3.0, monkeypatch)
    assert "takes 3,000 ms" in reading_rate(disk.dataset(), 2, 1)
    assert disk.reads == 1

    def damaged(*_):
        raise InputError("damaged")

    dataset = disk.dataset()
    dataset.read = damaged
    assert reading_rate(dataset, 2, 1) == ""


@pytest.mark.parametrize("statistic", ["min", "max", "mean"])
def test_statistics_of_subjects_are_those_of_pandas(statistic):
    """Unknown values are left out; a subject without known ones is unknown; subjects need not be sorted."""
    rng = np.random.default_rng(0)
    subject = rng.permutation(np.repeat(np.arange(30), 4))
    values = rng.normal(size=120)
    values[rng.random(120) < 0.3] = np.nan
    values[subject == 7] = np.nan
    expected = pd.Series(values).groupby(subject).transform(statistic)
    np.testing.assert_array_equal(_per_subject(values, subject, statistic), expected)
    assert len(_per_subject(np.empty(0), np.empty(0, int), statistic)) == 0
