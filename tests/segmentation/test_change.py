"""Yearly change against scipy and planted truth; the pictures of it."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lssl.segmentation.change import COLUMNS, yearly_change
from lssl.segmentation.trajectories import draw_cohort, draw_subject, slice_of


def volumes(courses, structure="hippocampus", offset=60.0):
    """Rows of subjects, each given as years → mm³."""
    return pd.DataFrame(
        [
            {"subject": name, "session": f"{number}", "age": offset + years, "years": years, "structure": structure}
            | {"mm3": mm3}
            for name, course in courses.items()
            for number, (years, mm3) in enumerate(course)
        ]
    )


def noisy(draw, visits, slope, noise):
    years = np.sort(draw.uniform(0, 6, visits))
    return list(zip(years, 4000 + slope * years + noise * draw.standard_normal(visits), strict=True))


def test_slope_error_and_interval_are_those_of_scipy():
    draw = np.random.default_rng(0)
    courses = {f"s{n}": noisy(draw, n, -40 * n, 25) for n in (3, 4, 7)}
    table = pd.concat([volumes(courses, name) for name in ("left", "right")], ignore_index=True)
    table.loc[table["structure"] == "right", "mm3"] *= draw.uniform(0.9, 1.1, len(table) // 2)
    found = yearly_change(table.sample(frac=1, random_state=0))  # in any order
    assert list(found.columns) == list(COLUMNS)
    assert len(found) == 6
    for row in found.to_dict("records"):
        own = table[(table["subject"] == row["subject"]) & (table["structure"] == row["structure"])]
        line = stats.linregress(own["years"], own["mm3"] / 1000)
        half = stats.t.ppf(0.975, len(own) - 2) * line.stderr
        mean = own["mm3"].mean() / 1000
        expected = np.array([line.slope, line.stderr, line.slope - half, line.slope + half])
        for rate, scale in (("ml_per_year", 1), ("percent_per_year", 100 / mean)):
            values = [row[f"{rate}{part}"] for part in ("", "_se", "_low", "_high")]
            np.testing.assert_allclose(values, expected * scale, rtol=1e-9)
        assert row["visits"] == len(own)
        assert row["mean_ml"] == pytest.approx(mean)


def test_a_planted_rate_is_found_and_its_interval_covers_it():
    """Of 400 subjects of four noisy visits, 95 % of the intervals hold the true slope."""
    draw = np.random.default_rng(1)
    found = yearly_change(volumes({f"s{n}": noisy(draw, 4, -60, 20) for n in range(400)}))
    assert found["ml_per_year"].mean() == pytest.approx(-0.06, abs=3 * 0.01 / 20)
    covered = found["ml_per_year_low"].lt(-0.06) & found["ml_per_year_high"].gt(-0.06)
    assert 0.92 < covered.mean() < 0.98


def test_two_visits_give_a_rate_alone_and_fewer_none():
    nan = float("nan")
    found = yearly_change(
        volumes(
            {
                "two": [(0.0, 1000.0), (2.0, 900.0)],
                "one": [(0.0, 1000.0)],
                "untimed": [(nan, 1000.0), (nan, 900.0)],
                "partly": [(0.0, 1000.0), (nan, 5000.0), (4.0, 1400.0)],
                "same": [(1.0, 1000.0), (1.0, 1100.0), (1.0, 1050.0)],
                "absent": [(0.0, 0.0), (1.0, 0.0), (2.0, 0.0)],
            }
        )
    ).set_index("subject")
    assert found.loc["two", "ml_per_year"] == pytest.approx(-0.05)
    assert found.loc["two", "percent_per_year"] == pytest.approx(-50 / 950 * 100)
    assert found.loc["partly", ["visits", "ml_per_year"]].tolist() == [2, pytest.approx(0.1)]
    assert found.loc[["one", "untimed", "same"], "ml_per_year"].isna().all()
    assert found["visits"].to_dict() == {"two": 2, "one": 1, "untimed": 0, "partly": 2, "same": 3, "absent": 3}
    assert found.loc["absent", "ml_per_year"] == 0
    assert np.isnan(found.loc["absent", "percent_per_year"])
    assert found.loc[["two", "one", "untimed", "partly", "same"], "ml_per_year_se"].isna().all()
    assert found.loc[["two", "one", "untimed", "partly", "same"], "percent_per_year_low"].isna().all()


def test_the_rate_is_that_of_the_metric():
    """`TrajectoryError` of a prediction without change is the magnitude of the true rate."""
    import torch

    from lssl.metrics import TrajectoryError

    years, mm3 = np.array([0.0, 1.5, 4.0]), np.array([1000.0, 950.0, 930.0])
    error = TrajectoryError(1)
    error.update(torch.full((3, 1), 1000.0), torch.tensor(mm3)[:, None], torch.tensor(years))
    found = yearly_change(volumes({"a": list(zip(years, mm3, strict=True))}))
    assert -found["percent_per_year"].item() == pytest.approx(error.compute().item(), rel=1e-5)


def test_no_visit_at_all_has_no_time():
    found = yearly_change(volumes({"a": [(float("nan"), 1.0)], "b": [(float("nan"), 2.0)]}))
    assert found["visits"].tolist() == [0, 0]


def test_pictures(tmp_path):
    draw = np.random.default_rng(0)
    courses = {f"s{n}": noisy(draw, n, -40 * n, 25) for n in (1, 2, 3, 4)}
    table = pd.concat([volumes(courses, name) for name in ("left", "right")], ignore_index=True)
    change = yearly_change(table)
    assert draw_cohort(table, change, tmp_path / "trajectories.png", "cohort")
    label = np.zeros((10, 12, 14), np.int16)
    label[2:5, 3:6, 4:8] = 17
    label[3, 4, 6] = 0
    parts, height = [], None
    for number in range(3):
        affine = np.diag([2.0, 2.0, 2.0, 1.0])
        affine[2, 3] = 4.0 * number  # another field of view: the same anatomy two slices lower
        shifted = np.roll(label, -2 * number, 2)
        part, height = slice_of(f"v{number}", np.ones(label.shape), shifted, affine, height)
        parts.append(part)
    assert height == 8.0  # the first of the fullest slices, and the same place at each visit
    for part in parts:
        np.testing.assert_array_equal(part.label, parts[0].label)
    for subject in ("s1", "s3"):
        rows, rates = table[table["subject"] == subject], change[change["subject"] == subject]
        draw_subject(subject, parts, rows, rates, tmp_path / f"{subject}.png")
    assert {path.name for path in tmp_path.iterdir()} == {"trajectories.png", "s1.png", "s3.png"}
    assert not draw_cohort(table.assign(years=np.nan), change, tmp_path / "none.png", "without times")
