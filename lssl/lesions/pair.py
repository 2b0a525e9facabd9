"""What the files of ChangeSegmenter say of a pair of visits."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lssl.data.batch import PairBatch

__all__ = ["described"]


def described(batch: PairBatch, table: pd.DataFrame) -> tuple[pd.Series, dict[str, Any]]:
    """The later visit's row of the table, and the pair's ``subject``, ``session`` (earlier/later) and ``years``."""
    first, second = (table.iloc[row] for row in batch.session[0].tolist())
    years = float(batch.times[0, 1] - batch.times[0, 0])
    session = f"{first['session']}/{second['session']}"
    return second, {"subject": second["subject"], "session": session, "years": years}
