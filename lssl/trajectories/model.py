r"""The mean course of a measure and its yearly slope in each group, by a linear mixed model.

A measure y of subject i at age (or time) a, with the subject's mean age ā:

.. math::

   y_{ij} = \beta_{g} + \gamma\,(\bar a_i - \bar a) + \sigma_{g}\,(a_{ij} - \bar a_i) + u_i + w_i\,(a_{ij} - \bar a_i)
            + \varepsilon_{ij}

β and σ differ by group g; u and w are normal and belong to the subject. Age is split into its mean and the difference
from it (Neuhaus and Kalbfleisch, Biometrics 1998), so that σ is how subjects change, and not how old subjects differ
from young ones. Where random slopes cannot be estimated (no subject with three visits, or no convergence), w is left
out, and the table says so.

Fitted by REML with statsmodels' ``MixedLM`` and Powell's method. On balanced visits, where the answer has a closed
form, its gradient methods stopped short: standard errors came out 42 % too small to 5 times too large.

Intervals are ``σ ± t(0.975, n - 1) · se``, with n the group's subjects that have two or more different times. Normal
quantiles, the default of statsmodels, give intervals that are too narrow for few subjects. For the difference of two
groups, n is that of the smaller one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

__all__ = ["SLOPES", "Course", "fit_course"]

LEAST = 2  # subjects of a group with a slope of their own
SLOPES = (
    "measure",
    "group",
    "subjects",
    "visits",
    "mean",
    "slope_per_year",
    "se",
    "low",
    "high",
    "percent_per_year",
    "difference",
    "difference_low",
    "difference_high",
    "p",
    "random_slopes",
)
"""Columns of ``slopes.tsv``: of each measure and group, ``difference`` and ``p`` to the first group."""


@dataclass
class Course:
    """What was found of one measure.

    Attributes:
        slopes: a row per group, with :data:`SLOPES` but ``measure``.
        lines: group → ages ``(n,)``, mean course ``(n,)`` and half-width of its 95 % interval ``(n,)``.
    """

    slopes: pd.DataFrame
    lines: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


def fit_course(rows: pd.DataFrame, groups: Sequence[str], adjust: Sequence[str] = ()) -> Course | None:
    """Fits one measure; ``None`` if no group has :data:`LEAST` subjects with two different times.

    Args:
        rows: a row per visit with ``subject``, ``group``, ``at`` (years: age, or time since the first visit) and
            ``value``; visits without a value or a time are left out.
        groups: in the order of the table; the others are compared with the first one that can be fitted.
        adjust: columns of ``rows`` that are held constant, numbers or names.
    """
    rows = rows.dropna(subset=["value", "at", *adjust]).copy()
    several = rows.groupby("subject")["at"].nunique()
    counts = rows[rows["subject"].isin(several.index[several > 1])].groupby("group")["subject"].nunique()
    fitted = [group for group in groups if counts.get(group, 0) >= LEAST]
    rows = rows[rows["group"].isin(fitted)].reset_index(drop=True)
    if not fitted:
        return None
    mean = rows.groupby("subject")["at"].transform("mean")
    rows["within"], rows["between"] = rows["at"] - mean, mean - mean.mean()
    design = _design(rows, fitted, adjust)
    scale = float(rows["value"].std()) or 1.0
    result, random_slopes = _fit(rows["value"] / scale, design, rows)
    if result is None:
        return None
    place, cov = (
        np.asarray(result.fe_params) * scale,
        np.asarray(result.cov_params())[: design.shape[1], :][:, : design.shape[1]] * scale**2,
    )
    columns = list(design.columns)
    table, lines = [], {}
    for group in fitted:
        own = rows[rows["group"] == group]
        slope = _contrast(columns, {f"slope {group}": 1.0})
        quantile = float(stats.t.ppf(0.975, counts[group] - 1))
        mean_value = float(own["value"].mean())
        about: dict[str, Any] = {"group": group, "subjects": own["subject"].nunique(), "visits": len(own)}
        se = float(np.sqrt(slope @ cov @ slope))
        value = float(slope @ place)
        percent = 100 * value / mean_value if mean_value > 0 and (own["value"] >= 0).all() else np.nan
        about |= {
            "mean": mean_value,
            "slope_per_year": value,
            "se": se,
            "low": value - quantile * se,
            "high": value + quantile * se,
        }
        about |= {"percent_per_year": percent, "random_slopes": random_slopes}
        if group != fitted[0]:
            about |= _difference(columns, place, cov, group, fitted[0], int(counts[[group, fitted[0]]].min()) - 1)
        table.append(about)
        lines[group] = _line(columns, place, cov, own, group, quantile)
    return Course(pd.DataFrame(table).reindex(columns=[name for name in SLOPES if name != "measure"]), lines)


def _design(rows: pd.DataFrame, groups: Sequence[str], adjust: Sequence[str]) -> pd.DataFrame:
    """Columns ``group G``, ``slope G``, ``between``, and those of what is held constant, centred."""
    parts = {f"group {group}": (rows["group"] == group).astype(float) for group in groups}
    parts |= {f"slope {group}": (rows["group"] == group) * rows["within"] for group in groups}
    parts["between"] = rows["between"]
    for name in adjust:
        if pd.api.types.is_numeric_dtype(rows[name]):
            levels = pd.DataFrame({name: rows[name]})
        else:
            levels = pd.get_dummies(rows[name].astype(str), prefix=name, drop_first=True).astype(float)
        parts |= {f"held {column}": levels[column] - levels[column].mean() for column in levels}
    design = pd.DataFrame(parts)
    keep = [
        str(name) for name in design if not str(name).startswith(("held", "between")) or design[name].abs().max() > 1e-9
    ]
    return design[keep]


def _fit(values: pd.Series, design: pd.DataFrame, rows: pd.DataFrame) -> tuple[Any, bool]:
    """The fitted model, and whether it has random slopes; ``None`` if neither form can be fitted."""
    from statsmodels.regression.mixed_linear_model import MixedLM

    forms = [True, False] if rows.groupby("subject")["at"].nunique().max() > 2 else [False]
    for random_slopes in forms:
        random = np.column_stack([np.ones(len(rows)), *([rows["within"]] if random_slopes else [])])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of convergence; it is asked for below
            try:
                result = MixedLM(values, design, groups=rows["subject"], exog_re=random).fit(reml=True, method="powell")
            except (np.linalg.LinAlgError, ValueError):
                continue
        if result.converged and np.isfinite(np.asarray(result.bse_fe)).all():
            return result, random_slopes
    return None, False


def _contrast(columns: Sequence[str], weights: dict[str, float]) -> np.ndarray:
    return np.array([weights.get(name, 0.0) for name in columns])


def _difference(
    columns: Sequence[str], place: np.ndarray, cov: np.ndarray, group: str, first: str, free: int
) -> dict[str, float]:
    """Slope of a group less that of the first, its interval, and p (two-sided, t)."""
    contrast = _contrast(columns, {f"slope {group}": 1.0, f"slope {first}": -1.0})
    value, se = float(contrast @ place), float(np.sqrt(contrast @ cov @ contrast))
    half = float(stats.t.ppf(0.975, free)) * se
    p = float(2 * stats.t.sf(abs(value) / se, free)) if se > 0 else np.nan
    return {"difference": value, "difference_low": value - half, "difference_high": value + half, "p": p}


def _line(
    columns: Sequence[str], place: np.ndarray, cov: np.ndarray, own: pd.DataFrame, group: str, quantile: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The group's mean course, through its mean age, over the ages that its subjects pass through themselves."""
    centre, reach = float(own["at"].mean()), float(own["within"].abs().max())
    ages = np.linspace(max(own["at"].min(), centre - reach), min(own["at"].max(), centre + reach), 25)
    between = float(own["between"].mean())
    contrasts = np.stack(
        [_contrast(columns, {f"group {group}": 1.0, f"slope {group}": a - centre, "between": between}) for a in ages]
    )
    half = quantile * np.sqrt(np.einsum("ni,ij,nj->n", contrasts, cov, contrasts))
    return ages, contrasts @ place, half
