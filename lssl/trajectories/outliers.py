"""Visits and subjects that lie far from what others of their group do."""

from __future__ import annotations

import numpy as np
import pandas as pd

__all__ = ["FAR", "outliers"]

FAR = 3.5  # of the modified z-score, as Iglewicz and Hoaglin (1993) recommend
LEAST = 5  # subjects, or visits, without which nothing is called far


def outliers(visits: pd.DataFrame, measure: str) -> pd.DataFrame:
    r"""Subjects whose slope, and visits whose distance from their subject's line, is far from the group's.

    The modified z-score of a value x among others is ``0.6745 (x - median) / MAD`` (Iglewicz and Hoaglin, 1993); above
    :data:`FAR` either way it is listed. Slopes are straight lines through a subject's visits at two or more times. A
    visit is compared with the line through the subject's *other* visits, so that it cannot hide by drawing the line to
    itself; that takes three visits. Its distance counts over ``sqrt(1 + 1/n + (t - t̄)² / Σ (tⱼ - t̄)²)``, the error of a
    prediction from n others, as lines are uncertain beyond their ends. Of a subject, the farthest visit is listed.

    Args:
        visits: a row per visit with ``subject``, ``session``, ``group``, ``at`` (years) and the measure.
        measure: its column.

    Returns:
        ``subject``, ``session`` (empty for a slope), ``group``, ``measure``, ``what`` (slope or visit), ``value`` (a
        year, or the distance) and ``z``.
    """
    rows = visits.dropna(subset=["at", measure])
    slopes, distances = [], []
    for (group, subject), own in rows.groupby(["group", "subject"], sort=False):
        at, value = own["at"].to_numpy(float), own[measure].to_numpy(float)
        line = _line(at, value)
        if line is None:
            continue
        slopes.append((subject, "", group, line[0], line[0]))
        for row in range(len(own)) if len(own) > 2 else ():
            others = np.arange(len(own)) != row
            rest = _line(at[others], value[others])
            if rest is not None:
                far = value[row] - rest[0] * at[row] - rest[1]
                beyond = (at[row] - at[others].mean()) ** 2 / ((at[others] - at[others].mean()) ** 2).sum()
                distances.append(
                    (subject, own["session"].iloc[row], group, far, far / np.sqrt(1 + 1 / others.sum() + beyond))
                )
    columns = ["subject", "session", "group", "value", "scaled"]
    found = []
    for what, values in (("slope", slopes), ("visit", distances)):
        table = pd.DataFrame(values, columns=columns)
        table["z"] = table.groupby("group")["scaled"].transform(_modified_z)
        farthest = (
            table.loc[table["z"].abs().sort_values(ascending=False).index].drop_duplicates("subject").sort_index()
        )
        found.append(farthest[farthest["z"].abs() > FAR].assign(measure=measure, what=what))
    return pd.concat(found, ignore_index=True)[["subject", "session", "group", "measure", "what", "value", "z"]]


def _line(at: np.ndarray, value: np.ndarray) -> tuple[float, float] | None:
    """Slope and intercept by least squares; ``None`` of fewer than two times."""
    centred = at - at.mean()
    square = float(centred @ centred)
    if square < 1e-9:
        return None
    slope = float(centred @ value) / square
    return slope, float(value.mean() - slope * at.mean())


def _modified_z(values: pd.Series) -> pd.Series:
    far = values - values.median()
    spread = far.abs().median()
    return 0.6745 * far / spread if len(values) >= LEAST and spread > 0 else values * 0.0
