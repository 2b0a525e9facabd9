"""Mixed models: planted slopes, their intervals over many cohorts, and age differences that are no change."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lssl.trajectories.model import fit_course
from lssl.trajectories.outliers import outliers


def cohort(seed, slopes, subjects=8, visits=4, between=-2.0, noise=0.5, spread=0.5):
    """Subjects of ages 60 to 80 who differ by ``between`` a year of age, and change by their group's slope."""
    rng, rows = np.random.default_rng(seed), []
    for group, slope in slopes.items():
        for number in range(subjects):
            start, level, own = rng.uniform(60, 80), rng.normal(0, 5), slope + rng.normal(0, spread)
            for visit in range(visits):
                at = start + visit + rng.uniform(-0.1, 0.1)
                value = 100 + level + between * (start - 70) + own * (at - start) + rng.normal(0, noise)
                rows.append((f"{group}{number}", f"ses-{visit}", group, at, value))
    return pd.DataFrame(rows, columns=["subject", "session", "group", "at", "value"])


def test_the_slope_is_how_subjects_change_and_not_how_old_and_young_differ():
    """A model of age alone would give something between -1 and +3."""
    course = fit_course(cohort(0, {"all": -1.0}, subjects=30, between=3.0), ["all"])
    (row,) = course.slopes.to_dict("records")
    assert row["slope_per_year"] == pytest.approx(-1.0, abs=0.25)
    assert row["low"] < -1.0 < row["high"]
    assert row["random_slopes"]
    assert row["percent_per_year"] == pytest.approx(100 * row["slope_per_year"] / row["mean"])
    ages, mean, half = course.lines["all"]
    assert np.polyfit(ages, mean, 1)[0] == pytest.approx(row["slope_per_year"])
    assert (half > 0).all()


def test_balanced_visits_give_the_mean_of_the_subjects_own_slopes():
    """With equal times and a random slope, REML's slope is the mean of the slopes, and its error theirs over √n."""
    rows = cohort(1, {"all": -1.0}, subjects=12, spread=1.0)
    rows["at"] = rows["session"].str[-1].astype(float)
    own = np.array([np.polyfit(g["at"], g["value"], 1)[0] for _, g in rows.groupby("subject")])
    (row,) = fit_course(rows, ["all"]).slopes.to_dict("records")
    assert row["slope_per_year"] == pytest.approx(own.mean(), rel=1e-4)
    assert row["se"] == pytest.approx(own.std(ddof=1) / np.sqrt(12), rel=0.02)


def test_groups_differ_by_the_planted_difference():
    rows = cohort(2, {"control": -0.5, "patient": -2.5}, subjects=12)
    first, second = fit_course(rows, ["control", "patient"]).slopes.to_dict("records")
    assert np.isnan(first["difference"])
    assert second["difference"] == pytest.approx(-2.0, abs=0.6)
    assert second["difference_low"] < -2.0 < second["difference_high"] < 0
    assert second["p"] < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("subjects", "visits"), [(5, 4), (8, 3), (8, 2)])
def test_intervals_cover(subjects, visits):
    covered = []
    for seed in range(120):
        table = fit_course(cohort(seed, {"a": -1.0, "b": -1.0}, subjects, visits), ["a", "b"]).slopes
        covered += [
            *((table["low"] <= -1) & (table["high"] >= -1)),
            bool(table["difference_low"][1] <= 0 <= table["difference_high"][1]),
        ]
    assert np.mean(covered) > 0.91


def test_what_is_held_constant_no_longer_biases():
    """Motion lowers the value and grows with time: left alone, it looks like atrophy."""
    rows = cohort(3, {"all": 0.0}, subjects=20, noise=0.1, spread=0.1)
    rng = np.random.default_rng(0)
    rows["motion"] = rows["session"].str[-1].astype(float) + rng.normal(0, 1.0, len(rows))
    rows["value"] -= 2 * rows["motion"]
    blind = fit_course(rows, ["all"]).slopes["slope_per_year"][0]
    held = fit_course(rows, ["all"], ["motion"]).slopes["slope_per_year"][0]
    assert blind == pytest.approx(-2.0, abs=0.4)
    assert held == pytest.approx(0.0, abs=0.2)


def test_two_visits_have_no_random_slope_and_single_visits_no_model():
    rows = cohort(4, {"all": -1.0}, visits=2)
    assert not fit_course(rows, ["all"]).slopes["random_slopes"][0]
    assert fit_course(cohort(4, {"all": -1.0}, visits=1), ["all"]) is None
    few = rows[(rows["subject"] == "all0") | (rows["session"] == "ses-0")]
    assert fit_course(few, ["all"]) is None


def test_outliers_are_the_planted_ones():
    rows = cohort(5, {"a": -1.0}, subjects=10, noise=0.1, spread=0.05)
    rows.loc[(rows["subject"] == "a3") & (rows["session"] == "ses-1"), "value"] += 5
    fast = rows["subject"] == "a7"
    rows.loc[fast, "value"] -= 3 * (rows.loc[fast, "at"] - rows.loc[fast, "at"].min())
    found = outliers(rows, "value")
    visit = found[found["what"] == "visit"]
    assert set(visit["subject"]) == {"a3"}
    assert visit.loc[visit["z"].abs().idxmax(), "session"] == "ses-1"
    slopes = found[found["what"] == "slope"].set_index("subject")
    assert slopes.loc["a7", "value"] == pytest.approx(-4.0, abs=0.3)
    assert slopes.loc["a7", "z"] < -3.5
    assert outliers(cohort(6, {"a": -1.0}, subjects=3), "value").empty
