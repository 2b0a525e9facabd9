"""Pictures of predicted volumes over time: one page of a cohort, and one picture of each subject."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from lssl.pictures.overlay import label_colours
from lssl.utils.canvas import GREY, cut, figure, show

__all__ = ["SegmentedSlice", "draw_cohort", "draw_subject", "slice_of"]

ACROSS = 4  # panels of a row
NAMED = 10  # subjects that get colours of their own
SHOWN = 8  # visits of a subject whose slices are drawn
PALE, LINE = "#4477aa", "#222222"


@dataclass
class SegmentedSlice:
    """The axial slice of a visit that holds most of what was segmented.

    Attributes:
        title: of the visit.
        image: ``(D, H, 1)``.
        label: ``(D, H, 1)`` label values.
        affine: ``(4, 4)`` index → frame in mm.
    """

    title: str
    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray


def slice_of(title: str, image: np.ndarray, label: np.ndarray, affine: np.ndarray, height: float | None) -> Any:
    """The slice for pictures, and its height in mm.

    Args:
        title: of the visit.
        image: ``(D, H, W)``.
        label: ``(D, H, W)``.
        affine: ``(4, 4)`` index → frame in mm.
        height: of the slice of an earlier visit, whose anatomy is taken again; ``None`` takes the fullest slice.
    """
    count, axis = label.shape[2], affine[:3, 2] / np.linalg.norm(affine[:3, 2])
    heights = (affine[:3, 3] + np.outer(np.arange(count), affine[:3, 2])) @ axis
    full = int((label > 0).sum((0, 1)).argmax())
    index = full if height is None or not heights.min() <= height <= heights.max() else _nearest(heights, height)
    here = slice(index, index + 1)
    return SegmentedSlice(title, image[:, :, here].copy(), label[:, :, here].copy(), affine), float(heights[index])


def _nearest(values: np.ndarray, value: float) -> int:
    return int(np.abs(values - value).argmin())


def draw_cohort(volumes: pd.DataFrame, change: pd.DataFrame, path: Path, title: str) -> bool:
    """A panel per structure, a line per subject, over age or over years since the first visit; False without times.

    Args:
        volumes: see :func:`lssl.segmentation.change.yearly_change`; also ``age``.
        change: what that function found.
        path: PNG.
        title: over the page.
    """
    known = volumes[volumes["years"].notna()]
    structures, subjects = list(known["structure"].unique()), list(known["subject"].unique())
    if not structures:
        return False
    over, label = _axis(known)
    colours = _colours(subjects)
    with figure(path, math.ceil(len(structures) / ACROSS), min(ACROSS, len(structures)), title, 3.0) as axes:
        for axis, structure in zip(axes.flat, structures, strict=False):
            for subject, rows in known[known["structure"] == structure].groupby("subject", sort=False):
                style = {"color": colours[subject], "alpha": 0.9 if len(subjects) <= NAMED else 0.45}
                ordered = rows.sort_values("years")
                axis.plot(ordered[over], ordered["mm3"] / 1000, ".-", linewidth=1.0, markersize=4, **style)
            rates = change.loc[change["structure"] == structure, "percent_per_year"].dropna()
            median = f"\nmedian {rates.median():+.2f} %/year of {len(rates)}" if len(rates) else ""
            _frame(axis, f"{structure}{median}", label)
        _hide(axes, len(structures))
        if len(subjects) <= NAMED:
            lines = [Line2D([], [], color=colour, marker=".", label=name) for name, colour in colours.items()]
            place = {"loc": "outside lower center", "ncols": min(5, len(lines)), "fontsize": 8}
            axes[0, 0].figure.legend(handles=lines, **place)
    return True


def draw_subject(
    subject: str, slices: Sequence[SegmentedSlice], volumes: pd.DataFrame, change: pd.DataFrame, path: Path
) -> None:
    """A subject's visits with what was segmented, then a panel per structure with the fitted line.

    Args:
        subject: its name.
        slices: of its visits, in time order.
        volumes: its rows.
        change: its rows.
        path: PNG.
    """
    kept = [slices[round(place)] for place in np.linspace(0, len(slices) - 1, min(SHOWN, len(slices)))]
    known = volumes[volumes["years"].notna()]
    structures = list(known["structure"].unique()) if known["years"].nunique() > 1 else []
    top = math.ceil(len(kept) / ACROSS)
    values = sorted({int(value) for part in kept for value in np.unique(part.label) if value > 0})
    with figure(path, top + math.ceil(len(structures) / ACROSS), ACROSS, _heading(subject, slices), 3.0) as axes:
        for axis, part in zip(axes[:top].flat, kept, strict=False):
            _overlay(axis, part, values)
        _hide(axes[:top], len(kept))
        for axis, structure in zip(axes[top:].flat, structures, strict=False):
            _course(axis, known[known["structure"] == structure], change[change["structure"] == structure].iloc[0])
        _hide(axes[top:], len(structures))


def _heading(subject: str, slices: Sequence[SegmentedSlice]) -> str:
    many = f"{SHOWN} of {len(slices)} visits" if len(slices) > SHOWN else "visits"
    return f"{subject}: {many} with what was segmented (axial, patient's right on the left), and volumes over time"


def _overlay(axis: Axes, part: SegmentedSlice, values: Sequence[int]) -> None:
    high = max(float(np.quantile(part.image, 0.995)), 1e-6)
    drawn = show(axis, part.image / high, part.affine, (0, 0, 0), part.title, mark=None)
    label = cut(part.label, (0, 0, 0)).astype(int)
    painted = np.zeros((*label.shape, 4))
    for value, colour in label_colours(values).items():
        painted[label == value] = (*colour, 0.45)
    axis.imshow(painted, aspect=axis.get_aspect(), interpolation="nearest", extent=drawn.get_extent())


def _course(axis: Axes, rows: pd.DataFrame, change: pd.Series) -> None:
    """Volumes of one structure, their line, and its slope in words."""
    over, label = _axis(rows)
    rows = rows.sort_values("years")
    axis.plot(rows[over], rows["mm3"] / 1000, "o", color=PALE, markersize=5)
    middle, ends = rows["years"].mean(), np.array([rows["years"].min(), rows["years"].max()])
    line = change["mean_ml"] + change["ml_per_year"] * (ends - middle)
    axis.plot(ends + (rows[over] - rows["years"]).mean(), line, color=LINE, linewidth=1.2)
    rate, low, high = (change[f"percent_per_year{part}"] for part in ("", "_low", "_high"))
    interval = f" [{low:+.1f}, {high:+.1f}]" if low == low else " (two visits: no interval)"
    words = f"{rate:+.2f} %/year{interval}" if rate == rate else "no rate"
    _frame(axis, f"{change['structure']}\n{words}", label)


def _axis(rows: pd.DataFrame) -> tuple[str, str]:
    """Column and name of the horizontal axis: the age if it is known of all visits."""
    return ("age", "age, years") if rows["age"].notna().all() else ("years", "years since the first visit")


def _colours(subjects: Sequence[str]) -> dict[str, Any]:
    table = mpl.colormaps["tab10"]
    return {name: table(row) if len(subjects) <= NAMED else PALE for row, name in enumerate(subjects)}


def _frame(axis: Axes, title: str, label: str) -> None:
    axis.set_title(title, fontsize=8)
    axis.set_xlabel(label, fontsize=7)
    axis.set_ylabel("ml", fontsize=7)
    axis.tick_params(labelsize=7)
    axis.ticklabel_format(useOffset=False)
    axis.grid(color=GREY, alpha=0.2, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _hide(axes: np.ndarray, used: int) -> None:
    for axis in list(axes.flat)[used:]:
        axis.set_axis_off()
