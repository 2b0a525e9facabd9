"""Series: K different visits of one subject in time order, where a pair has two."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lssl.data.pairs import PairIndex, build_pairs, count, item_name
from lssl.utils.memory import refuse_larger_than_memory

__all__ = ["build_series"]

ROW = 3 * 4  # bytes of each number while rows are joined: int32, a copy, and the places of both


def build_series(
    table: pd.DataFrame, index: PairIndex, policy: str, limits: tuple[float, float | None], visits: int
) -> PairIndex:
    """Series of a table: chains of pairs, each of which begins with the visit that the one before ends with.

    So every two neighbours in a series are a pair that the policy and the limits on the interval allow. Of ``any``
    pairs these are all choices of K visits of a subject; of ``consecutive`` ones, K visits in a row. A series of the
    policy ``baseline`` begins with the first visit, and any later ones follow.

    Args:
        table: sorted by :func:`.pairs.order_visits`.
        index: its pairs, see :func:`.pairs.build_pairs`.
        policy: of the pairs.
        limits: shortest and longest interval between neighbours in years.
        visits: K, 2 or more.

    Returns:
        ``(series, K)`` int32 rows as the pairs, sorted by subject, no single visits, and why subjects were left out.

    Raises:
        InputError: if there are more series than memory holds.
    """
    series = index.pairs
    steps = build_pairs(table, "any", *limits).pairs if policy == "baseline" else series
    for length in range(3, visits + 1):
        start = np.searchsorted(steps[:, 0], series[:, -1], "left")
        number = np.searchsorted(steps[:, 0], series[:, -1], "right") - start
        total = int(number.sum())
        refuse_larger_than_memory(
            ROW * total * length,
            f"visits_per_item is {visits}: a table of {total:,} {item_name(length)}",
            "set pairs to consecutive, limit the intervals, or choose fewer visits",
        )
        place = np.arange(total) + np.repeat(start - np.cumsum(number) + number, number)
        series = np.concatenate([np.repeat(series, number, 0), steps[place, 1:]], 1)
    excluded = list(index.excluded)
    if short := len(np.unique(index.subject[index.pairs[:, 0]])) - len(np.unique(index.subject[series[:, 0]])):
        excluded.append(f"{count(short, 'subject')} with pairs but no {item_name(visits)} (visits_per_item)")
    if len(index.singles):
        excluded.append(f"{count(len(index.singles), 'single visit')} (visits_per_item: {visits})")
    return PairIndex(index.subject, series.astype(np.int32), index.singles[:0], excluded)
