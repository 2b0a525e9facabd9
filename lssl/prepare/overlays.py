"""Masks and label maps of a cohort in sentences: found, taken and left, with counts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pandas as pd

from lssl.data.pairs import count

__all__ = ["overlay_lines"]

MOST = 5  # reasons that are printed
NONE = {
    "mask": "No masks found or asked for: the head is found in every image.",
    "label map": "No label maps found or asked for.",
}


def overlay_lines(table: pd.DataFrame, records: list[dict[str, Any]], subjects: set[str]) -> list[str]:
    """What became of masks and label maps.

    Args:
        table: the visits, with the columns mask and label.
        records: of the prepared subjects.
        subjects: names of the subjects that this run is about.
    """
    mine = table[table["subject"].isin(subjects)]
    visits = [visit for record in records for visit in record["visits"]]
    lines = []
    for kind, column in (("mask", "mask_from"), ("label map", "label_from")):
        paths = [path for path in mine[kind.split()[0]] if path]
        if not paths:
            lines.append(NONE[kind])
            continue
        origins = Counter(visit[column] for visit in visits if visit[column])
        taken, moved = sum(origins.values()), origins.pop("another grid", 0)
        origins.pop("own", None)
        others = sum(origins.values())
        how = [
            f"{moved} resampled from a grid of its own" if moved == 1 else f"{moved} resampled from grids of their own"
        ]
        how = how * (moved > 0) + [f"{others} from another visit of the subject"] * (others > 0)
        found = f"{count(len(set(paths)), kind)} found for {count(len(paths), 'visit')}"
        extra = f" ({', '.join(how)})" if how else ""
        lines.append(f"{found}: taken for {taken}{extra}, left for {len(paths) - taken}.")
    reasons = list(dict.fromkeys(reason for record in records for reason in record["overlays_left"].values()))
    lines += [f"left: {reason}" for reason in reasons[:MOST]]
    lines += [f"left: {len(reasons) - MOST} more, see overlays_left in records/"] * (len(reasons) > MOST)
    lost = Counter(text.split(" ")[0] for visit in visits for text in visit["lost_classes"].split(", ") if text)
    if lost:
        classes = ", ".join(f"{value} in {count(times, 'visit')}" for value, times in sorted(lost.items())[:10])
        lines.append(f"Classes of so few voxels that the new grid holds none: {classes}; choose a smaller --spacing.")
    return lines
