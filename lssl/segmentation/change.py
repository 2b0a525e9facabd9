"""Yearly change of the volumes of structures, per subject, with its uncertainty; without torch."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

__all__ = ["COLUMNS", "yearly_change"]

RATES = ("ml_per_year", "percent_per_year")
COLUMNS = (
    "subject",
    "structure",
    "visits",
    "years",
    "mean_ml",
    *(f"{rate}{part}" for rate in RATES for part in ("", "_se", "_low", "_high")),
)
"""Columns of ``change.csv``.

============================================ =========================================================================
column                                       meaning
============================================ =========================================================================
``visits``                                   visits with a known time, on which the rest of the row rests
``years``                                    from the first to the last of them
``mean_ml``                                  mean of their volumes
``ml_per_year``                              slope of a straight line through them (ordinary least squares)
``percent_per_year``                         the slope in % of ``mean_ml``: Reuter's symmetrised rate (NeuroImage 2012)
``…_se``, ``…_low``, ``…_high``              standard error and 95 % t-interval; of three visits or more
============================================ =========================================================================
"""


def yearly_change(volumes: pd.DataFrame) -> pd.DataFrame:
    """Slope of each structure of each subject over years, a row each, with the :data:`COLUMNS`.

    With V visits at times t, mean time t̄ and volumes v, the slope is ``b = Σ (t - t̄) v / S``, ``S = Σ (t - t̄)²``. Its
    standard error is ``sqrt(Σ residual² / ((V - 2) S))``, its interval ``b ± t(0.975, V - 2) se``. Both say how far
    the subject's own visits are from a line. Two visits lie on their line exactly: they give the rate alone. Visits
    without a time are left out; fewer than two different times give no rate. In percent, ``mean_ml`` counts as known:
    its error and the slope's are uncorrelated, and it is small against the mean.

    Args:
        volumes: a row per visit and structure, with ``subject``, ``structure``, ``years`` (NaN where unknown) and
            ``mm3``.
    """
    keys = ["subject", "structure"]
    every = volumes[keys].drop_duplicates()
    known = volumes[volumes["years"].notna()].copy()
    groups = known.groupby(keys, sort=False)
    known["ml"] = known["mm3"] / 1000
    known["time"] = known["years"] - groups["years"].transform("mean")
    known["square"] = known["time"] ** 2
    known["product"] = known["time"] * (known["ml"] - groups["mm3"].transform("mean") / 1000)
    groups = known.groupby(keys, sort=False)
    spread = groups["square"].sum()
    slope = (groups["product"].sum() / spread).where(spread > 0)
    fitted = known.join(slope.rename("slope"), on=keys)
    fitted["residual"] = (fitted["ml"] - groups["ml"].transform("mean") - fitted["slope"] * fitted["time"]) ** 2
    result = pd.DataFrame({"visits": groups.size(), "years": groups["years"].max() - groups["years"].min()})
    result["mean_ml"] = groups["ml"].mean()
    free = (result["visits"] - 2).where((result["visits"] > 2) & (spread > 0))
    error = np.sqrt(fitted.groupby(keys, sort=False)["residual"].sum() / (free * spread))
    half = error * stats.t.ppf(0.975, free)
    for rate, scale in zip(RATES, (1.0, 100 / result["mean_ml"].where(result["mean_ml"] > 0)), strict=True):
        parts = (slope, error, slope - half, slope + half)
        for part, values in zip(("", "_se", "_low", "_high"), parts, strict=True):
            result[f"{rate}{part}"] = values * scale
    rows = every.merge(result.reset_index(), how="left", on=keys)
    rows["visits"] = rows["visits"].fillna(0).astype(int)
    return rows[list(COLUMNS)]
