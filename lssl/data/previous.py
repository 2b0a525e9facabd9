"""The previous visit of each visit: whose change since then a label may tell."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd

__all__ = ["Previous", "previous_visits"]

#: Whether a visit comes with its previous one: not; always, so visits without one are left out; or where there is one,
#: and with itself where there is none.
Previous = Literal["no", "required", "where known"]


def previous_visits(table: pd.DataFrame, subject: np.ndarray) -> np.ndarray:
    """``(visits,)`` int32: row of each visit's previous one, -1 where there is none or the order is not known.

    Of visits at one time, none is the previous one of another; all have the one before.

    Args:
        table: sorted by :func:`.pairs.order_visits`.
        subject: ``(visits,)`` number of each row's subject.
    """
    time = table["time"].to_numpy(float)
    another = np.ones(len(table), dtype=bool)
    another[1:] = (np.diff(subject) != 0) | (np.diff(time) != 0)  # an unknown time is no other's
    before = np.flatnonzero(another)[np.cumsum(another) - 1] - 1
    known = (before >= 0) & (subject[before] == subject) & (table["ordered_by"].to_numpy() != "")
    return np.where(known, before, -1).astype(np.int32)
