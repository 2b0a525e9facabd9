"""How ``lssl inspect`` shows a report: tables on the screen, and one PNG."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from lssl.data.pairs import count
from lssl.prepare.inspection import EDGES, Inspection
from lssl.utils.files import atomic_write

if TYPE_CHECKING:
    from lssl.prepare.samples import Sample

__all__ = ["draw", "show"]

MOST = 20  # suspicious visits on the screen
SHOWN, ACROSS = 12, 3  # visits on the sheet, and in a row of it


def interval_names() -> list[str]:
    """The classes of the histogram, in words."""
    ends = [f"{low:g}–{high:g}" for low, high in pairwise(EDGES)]
    return [*ends, f"{EDGES[-1]:g}+"]


def show(report: Inspection, console: Console) -> None:
    """Prints the report."""
    content = report.as_json()
    table = Table(
        title=f"{report.folder} ({report.kind}, {', '.join(report.channels)})", title_justify="left", show_header=False
    )
    table.add_column(no_wrap=True)
    table.add_column()
    by_visits = ", ".join(f"{times} seen {number}×" for number, times in content["subjects_by_visits"].items())
    table.add_row("subjects", f"{content['subjects']} ({by_visits})")
    table.add_row("visits", str(content["visits"]))
    table.add_row("pairs", ", ".join(f"{policy} {number}" for policy, number in content["pairs"].items()))
    classes = zip(interval_names(), report.histogram().tolist(), strict=True)
    table.add_row(
        "pairs by years between", ", ".join(f"{name}: {number}" for name, number in classes if number) or "unknown"
    )
    for title, values in (
        ("voxels", report.shapes),
        ("spacing (mm)", report.spacings),
        ("orientation", report.orientations),
    ):
        common = ", ".join(f"{name} ({number})" for name, number in values.most_common(4))
        table.add_row(title, common + (f" and {len(values) - 4} others" if len(values) > 4 else ""))
    bright = content["brightest_99.9"]
    if bright:
        table.add_row(
            "99.9th percentile inside",
            f"{bright['lowest']:.4g} to {bright['highest']:.4g}, median {bright['median']:.4g}",
        )
    table.add_row("masks", content["masks"] or "none")
    table.add_row("label maps", content["labels"] or "none")
    table.add_row("without age, without time", f"{content['without_age']}, {content['without_time']} visits")
    if report.left_out:
        table.add_row("left out and noticed", "\n".join(report.left_out))
    if report.hours is None:
        table.add_row("on disk", f"{report.gigabytes:.3g} GB")
    else:
        size = f"{report.gigabytes:.2g} GB of {report.spacing:g} mm voxels"
        span = f"{report.hours:.2g} hours" if report.hours >= 1 else count(max(1, round(60 * report.hours)), "minute")
        table.add_row("prepared, about", f"{size}, {span} with one worker")
    console.print(table)
    _show_suspicious(report, console)


def _show_suspicious(report: Inspection, console: Console) -> None:
    looked = f" ({report.not_read()})" if report.not_read() else ""
    if not report.suspicious:
        console.print(f"No suspicious visits{looked}.")
        return
    console.print(f"Suspicious{looked}:")
    for visit, reason in report.suspicious[:MOST]:
        console.print(f"  {visit}: {reason}", soft_wrap=True)
    if len(report.suspicious) > MOST:
        console.print(f"  and {len(report.suspicious) - MOST} more; --json lists them all")


def draw(report: Inspection, path: Path) -> None:
    """Writes the sheet: visits per subject, intervals, brightness, and three slices of some visits."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from lssl.utils.canvas import show_slice

    samples = list(_samples(report).items())
    rows = math.ceil(len(samples) / ACROSS)
    with mpl.rc_context({"font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(15, 3.2 + 2.4 * rows), facecolor="white", layout="constrained")
        parts = figure.subfigures(
            2 if samples else 1, 1, height_ratios=[3, 2.4 * rows][: 1 + bool(rows)], squeeze=False
        )
        _draw_counts(parts[0, 0].subplots(1, 3), report)
        if samples:
            axes = parts[1, 0].subplots(rows, 3 * ACROSS, squeeze=False)
            for axis in axes.ravel()[3 * len(samples) :]:
                axis.axis("off")
            for three, (name, sample) in zip(axes.reshape(-1, 3), samples, strict=False):
                for plane, (axis, image) in enumerate(zip(three, sample.slices, strict=True)):
                    show_slice(axis, image, sample.affine, plane=plane)
                three[0].set_title(f"{name}\n{sample.note}", fontsize=8, loc="left")
        every = f"{report.table['subject'].nunique()} subjects, {len(report.table)} visits"
        figure.suptitle(f"{report.folder}: {every}; the patient's right is on the left", fontsize=11)
        with atomic_write(path) as part:
            figure.savefig(part, dpi=100, format="png")


def _draw_counts(axes: np.ndarray, report: Inspection) -> None:
    visits = report.table.groupby("subject").size().value_counts().sort_index()
    bright = np.array(report.brightest)
    edges = np.linspace(0.9 * bright.min(), 1.1 * bright.max(), 13) if len(bright) else np.arange(2.0)
    classes = [f"{edge:.3g}" for edge in (edges[1:] + edges[:-1]) / 2]
    for axis, names, counts, title, unit in (
        (axes[0], [str(number) for number in visits.index], visits.to_numpy(), "Visits of a subject", "visits"),
        (axes[1], interval_names(), report.histogram(), "Time between two visits", "years"),
        (
            axes[2],
            classes,
            np.histogram(bright, edges)[0],
            "Brightest tissue (99.9th percentile) of a visit",
            "raw value",
        ),
    ):
        bars = axis.bar(names, counts, color="#4477aa", width=0.85)
        axis.bar_label(bars, [str(number) if number else "" for number in counts], fontsize=9)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel(unit, fontsize=9)
        axis.set_yticks([])
        axis.tick_params(axis="x", labelsize=8, rotation=30 if len(names) > 6 else 0)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.margins(y=0.15)


def _samples(report: Inspection) -> dict[str, Sample]:
    """Of a prepared folder they are read here."""
    from lssl.prepare.samples import stored_sample

    if report.kind != "prepared":
        return dict(list(report.pictures.items())[:SHOWN])
    rows = report.table.iloc[:SHOWN]
    return {
        f"{subject} {session}": stored_sample(str(image))
        for subject, session, image in zip(rows["subject"], rows["session"], rows["image"], strict=True)
    }
