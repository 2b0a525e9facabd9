"""Curves of what runs logged; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from lssl.runs.log import RunLog, ordered_kinds, ordered_taps
from lssl.utils.canvas import GREY, figure

__all__ = ["draw_monitors", "draw_terms"]

#: Kind → title, and its level without information.
KINDS = {
    "feature_std": ("deviation of features (0: collapsed)", 0.0),
    "rank": ("effective rank", 1.0),
    "correlation": ("correlation of channels", None),
    "alignment": ("alignment", None),
    "uniformity": ("uniformity (0: collapsed)", 0.0),
    "matching": ("voxels matched", 0.0),
    "shortcut": ("place in the crop, R² on noise", 0.0),
    "position": ("place in the crop, R² on images", 0.0),
    "consistency": ("consistency across visits", 0.0),
    "dice": ("linear voxel probe, Dice", 0.0),
    "retrieval": ("same-subject retrieval@1", None),
    "identity": ("same subject, AUC", 0.5),
    "interval": ("distance by interval, Spearman", 0.0),
    "order": ("order of visits, AUC", 0.5),
    "age": ("age, R² (0 or less: none)", 0.0),
}
STYLES = ("-", "--", ":", "-.")


def draw_terms(runs: Sequence[RunLog], path: Path) -> bool:
    """Draws a panel for each term (training and validation, a colour for each run); returns whether there was any."""
    names = dict.fromkeys(
        name.partition("/")[2] for run in runs for name in run.curves if name.startswith(("train/", "val/"))
    )
    if not names:
        return False
    columns = min(4, len(names))
    title = "Terms: — training, – – held-out pairs" + (f" ({runs[0].name})" if len(runs) == 1 else "")
    with figure(path, -(-len(names) // columns), columns, title) as axes:
        for axis, name in zip(axes.flatten(), names, strict=False):
            for run, colour in zip(runs, _colours(len(runs)), strict=True):
                for stage, style in (("train", "-"), ("val", "--")):
                    if f"{stage}/{name}" in run.curves:
                        marker = "o" if stage == "val" else ""
                        steps, values = run.curves[f"{stage}/{name}"]
                        axis.plot(steps, values, style, color=colour, marker=marker, markersize=3, linewidth=1.4)
            _frame(axis, name)
        _finish(axes, len(names), runs if len(runs) > 1 else [])
    return True


def draw_monitors(runs: Sequence[RunLog], path: Path) -> bool:
    """Draws a panel for each kind (a colour for each tap, a line style for each run); returns whether there was any.

    A grey line marks the value of features without information.
    """
    kinds, taps = [kind for kind in ordered_kinds(runs) if kind in KINDS], ordered_taps(runs)
    if not kinds:
        return False
    columns = min(4, len(kinds))
    title = "Held-out subjects" + (f" ({runs[0].name})" if len(runs) == 1 else "")
    with figure(path, -(-len(kinds) // columns), columns, title) as axes:
        for axis, kind in zip(axes.flatten(), kinds, strict=False):
            text, nothing = KINDS[kind]
            if nothing is not None:
                axis.axhline(nothing, color=GREY, linewidth=0.8)
            for run, style in zip(runs, _cycle(STYLES, len(runs)), strict=True):
                for tap, colour in zip(taps, _colours(len(taps)), strict=True):
                    if f"monitor/{kind}/{tap}" in run.curves:
                        axis.plot(*run.curves[f"monitor/{kind}/{tap}"], style, color=colour, linewidth=1.4)
            _frame(axis, text)
            if "R²" in text:  # values far below 0 mean the same as 0
                axis.set_ylim(-1.05, 1.05)
        lines = [
            mpl.lines.Line2D([], [], color=colour, label=tap)
            for tap, colour in zip(taps, _colours(len(taps)), strict=True)
        ]
        _finish(axes, len(kinds), runs if len(runs) > 1 else [], lines, styled=True)
    return True


def _frame(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=7)
    axis.grid(color=GREY, alpha=0.2, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("step", fontsize=7)


def _finish(
    axes: np.ndarray, used: int, runs: Sequence[RunLog], lines: Sequence[mpl.lines.Line2D] = (), styled: bool = False
) -> None:
    """Hides empty panels, and adds the legend of taps and runs."""
    for axis in axes.flatten()[used:]:
        axis.set_axis_off()
    handles = list(lines)
    for run, style, colour in zip(runs, _cycle(STYLES, len(runs)), _colours(len(runs)), strict=True):
        look = {"linestyle": style, "color": GREY} if styled else {"color": colour}
        handles.append(mpl.lines.Line2D([], [], label=run.name, **look))
    if handles:
        axes[0, 0].figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize=8)


def _colours(number: int) -> list[Any]:
    """Colours that differ from those of their neighbours."""
    table = mpl.colormaps["tab10" if number <= 10 else "tab20"]
    return [table(place % table.N) for place in range(number)]


def _cycle(values: Sequence[str], number: int) -> list[str]:
    return [values[place % len(values)] for place in range(number)]
