"""What a network was trained on, without a name of a subject, a visit or a file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lssl.data.source import DataSource

__all__ = ["describe"]


def describe(data: Any) -> dict[str, Any]:
    """Counts and medians of a datamodule; of one that is no DataSource, the class alone.

    Args:
        data: a datamodule after its setup, or None.
    """
    if not isinstance(data, DataSource):
        return {} if data is None else {"class": type(data).__name__}
    table = data.table
    visits = table[table["split"] == "train"] if "split" in table else table
    ages = pd.to_numeric(visits["age"], errors="coerce") if "age" in visits else pd.Series(dtype=float)
    return {
        "class": type(data).__name__,
        "training_subjects": int(visits["subject"].nunique()),
        "training_visits": len(visits),
        "median_age_years": None if ages.isna().all() else round(float(np.nanmedian(ages)), 1),
        "channels": [str(name) for name in data.channels()],
        "spacing_mm": [round(float(side), 4) for side in data.working_spacing()],
    }
