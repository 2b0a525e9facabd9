"""How ``lssl inspect`` shows a report: tables on the screen, and one PNG."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from lssl.prepare.inspection import EDGES, Inspection
from lssl.utils.files import atomic_write

__all__ = ["draw", "show"]

MOST = 20  # suspicious visits on the screen
SHOWN = 12  # images on the sheet


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
        table.add_row("prepared, about", f"{size}, {report.hours:.2g} hours with one worker")
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
    """Writes the sheet: visits per subject, intervals, brightness, and some images (radiological convention)."""
    from matplotlib.figure import Figure

    images = list(_images(report).items())[:SHOWN]
    rows = 1 + math.ceil(len(images) / 6)
    figure = Figure(figsize=(13.5, 2.9 * rows), facecolor="white", layout="constrained")
    parts = figure.subfigures(2 if images else 1, 1, height_ratios=[1, rows - 1] if images else [1], squeeze=False)
    axes = parts[0, 0].subplots(1, 3)
    visits = report.table.groupby("subject").size().value_counts().sort_index()
    axes[0].bar([str(number) for number in visits.index], visits.to_numpy(), color="#4477aa")
    axes[0].set_title("subjects by number of visits", fontsize=10)
    axes[1].bar(interval_names(), report.histogram(), color="#4477aa")
    axes[1].set_title("pairs by years between visits", fontsize=10)
    axes[1].tick_params(axis="x", labelsize=7)
    axes[2].hist(report.brightest or [0.0], bins=20, color="#4477aa")
    axes[2].set_title("99.9th percentile inside, by visit", fontsize=10)
    if images:
        grid = parts[1, 0].subplots(rows - 1, 6, squeeze=False).ravel()
        for axis in grid:
            axis.axis("off")
        for axis, (name, image) in zip(grid, images, strict=False):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set_title(name, fontsize=7)
    figure.suptitle(
        f"{report.folder}: {report.table['subject'].nunique()} subjects, {len(report.table)} visits", fontsize=11
    )
    with atomic_write(path) as part:
        figure.savefig(part, dpi=80, format="png")


def _images(report: Inspection) -> dict[str, np.ndarray]:
    """Middle axial slices; of a prepared folder, only those slices are read."""
    if report.kind != "prepared":
        return report.pictures
    from lssl.data import STEP
    from lssl.data.store import read_stored

    found = {}
    for row in range(min(SHOWN, len(report.table))):
        stored = read_stored(str(report.table["image"].iat[row]))
        d, h, w = stored.shape
        slab = stored.box((0, 0, w // 2), (d, h, 1))[0][0, :, :, 0] * STEP
        found[f"{report.table['subject'].iat[row]} {report.table['session'].iat[row]}"] = slab[::-1, ::-1].T.clip(0, 1)
    return found
