"""The page of ``lssl trajectories``: spaghetti plots, slopes and outliers, in one HTML file that needs no other."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.lines import Line2D

from lssl.trajectories.model import Course
from lssl.utils.canvas import GREY, figure
from lssl.utils.page import image_tag, write_page

__all__ = ["draw_spaghetti", "write_report"]

ACROSS = 3  # panels of a row
SHOWN = 12  # subjects whose pictures stand on the page


def draw_spaghetti(
    visits: pd.DataFrame, courses: Mapping[str, Course | None], groups: Sequence[str], label: str, path: Path
) -> None:
    """A panel per measure: a thin line per subject, and each group's mean course with its 95 % interval.

    Args:
        visits: a row per visit with ``subject``, ``group``, ``at`` and a column per measure.
        courses: measure → what was fitted, if anything was.
        groups: in the order of their colours.
        label: of the horizontal axis.
        path: PNG.
    """
    colours = {group: mpl.colormaps["tab10"](number % 10) for number, group in enumerate(groups)}
    rows, columns = math.ceil(len(courses) / ACROSS), min(ACROSS, len(courses))
    with figure(path, rows, columns, f"{visits['subject'].nunique()} subjects, {len(visits)} visits", 3.8) as axes:
        for axis, (measure, course) in zip(axes.flat, courses.items(), strict=False):
            for (group, _), own in visits.dropna(subset=["at", measure]).groupby(["group", "subject"], sort=False):
                own = own.sort_values("at")
                style = {"color": colours[str(group)], "alpha": 0.35, "linewidth": 0.8, "markersize": 3}
                axis.plot(own["at"], own[measure], ".-", **style)
            for group, (at, mean, half) in course.lines.items() if course else ():
                axis.fill_between(at, mean - half, mean + half, color=colours[group], alpha=0.25, linewidth=0)
                axis.plot(at, mean, color=colours[group], linewidth=2.4)
            axis.set_title(
                measure if course else f"{measure}\n(not fitted: too few subjects with two visits, or equal values)",
                fontsize=9,
            )
            axis.set_xlabel(label, fontsize=8)
            axis.tick_params(labelsize=7)
            axis.ticklabel_format(useOffset=False)
            axis.grid(color=GREY, alpha=0.2, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        for axis in list(axes.flat)[len(courses) :]:
            axis.set_axis_off()
        if len(groups) > 1:
            lines = [Line2D([], [], color=colour, linewidth=2.4, label=group) for group, colour in colours.items()]
            axes[0, 0].figure.legend(handles=lines, loc="outside lower center", ncols=min(5, len(lines)), fontsize=9)


def write_report(
    path: Path, title: str, notes: Sequence[str], plot: Path, slopes: pd.DataFrame, far: pd.DataFrame, pictures: Path
) -> None:
    """Writes the page.

    Args:
        path: HTML.
        title: of the page.
        notes: sentences below it.
        plot: PNG of :func:`draw_spaghetti`.
        slopes: see :data:`lssl.trajectories.model.SLOPES`, and ``p_holm``.
        far: what :func:`lssl.trajectories.outliers.outliers` found.
        pictures: folder with a PNG per subject, as ``lssl predict`` of a Segmenter leaves it.
    """
    parts = [*(f"<p>{html.escape(note)}</p>" for note in notes), image_tag(plot, title)]
    parts += ["<h2>Slopes</h2>", _table(_slopes_shown(slopes)) if len(slopes) else "<p>None.</p>"]
    parts.append("<h2>Outliers</h2>")
    parts.append(_table(far.round({"value": 4, "z": 1})) if len(far) else "<p>None.</p>")
    for subject in list(dict.fromkeys(far["subject"]))[:SHOWN]:
        for name in (f"{subject}.png", f"sub-{subject}.png"):
            if (pictures / name).is_file():
                parts += [f"<h3>{html.escape(str(subject))}</h3>", image_tag(pictures / name, str(subject))]
                break
    write_page(path, title, parts)


def _slopes_shown(slopes: pd.DataFrame) -> pd.DataFrame:
    """Slopes with their intervals in words."""

    def interval(row: pd.Series, name: str, low: str, high: str) -> str:
        return "–" if pd.isna(row[name]) else f"{row[name]:+.4g} [{row[low]:+.4g}, {row[high]:+.4g}]"

    shown = slopes[["measure", "group", "subjects", "visits"]].copy()
    shown["a year [95 %]"] = [interval(row, "slope_per_year", "low", "high") for _, row in slopes.iterrows()]
    shown["% a year"] = ["–" if pd.isna(value) else f"{value:+.2f}" for value in slopes["percent_per_year"]]
    if slopes["difference"].notna().any():
        names = ("difference", "difference_low", "difference_high")
        shown["less the first group [95 %]"] = [interval(row, *names) for _, row in slopes.iterrows()]
        shown["p (Holm)"] = ["–" if pd.isna(value) else f"{value:.3g}" for value in slopes["p_holm"]]
    return shown


def _table(table: pd.DataFrame) -> str:
    text: str = table.to_html(index=False, border=0, na_rep="–", escape=True)
    return text
