"""Pictures of a subject to look at: edges of each visit on the first one, what differs, and each visit alone.

Edges say where two visits do not lie on each other whatever their contrasts are; of visits with one contrast, what is
left after their intensities are matched shows the rest. Slices are drawn at the finest resolution of the visits, in
radiological convention (:mod:`lssl.utils.canvas`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from scipy import ndimage

from lssl.utils.canvas import caption, show, show_slice
from lssl.utils.files import atomic_write

__all__ = ["Look", "draw_change", "draw_subject", "draw_visit", "edges", "middle"]

MOST = 6  # visits of a picture
SMOOTH = 1.0  # mm, standard deviation of the Gaussian whose edges are drawn
STEEPEST = 0.25  # share of the pixels of a head that are steep enough for an edge
HEAD = 150.0  # mm from the top of the head that hold the brain
EDGE, DIFFERENT = (1.0, 0.8, 0.0), 0.35  # colour of an edge; share of the window that is fully coloured
CHANGED, VEIL, AIR = 0.2, 0.7, 0.1  # change that is fully coloured, how much of the image it covers, and where none is
PLANES = ("axial", "coronal", "sagittal")


@dataclass(frozen=True)
class Look:
    """How a visit is shown.

    Attributes:
        name: of the visit.
        after: axial, coronal and sagittal slice ``(rows, columns)``, registered, about 1 in bright tissue.
        before: the same through one place of scanner coordinates.
        difference: ``after``, intensities matched, minus the first visit's; empty for another contrast.
        note: beside its row, such as its correlation.
    """

    name: str
    after: list[np.ndarray]
    before: list[np.ndarray]
    difference: list[np.ndarray]
    note: str = ""


def edges(image: np.ndarray, spacing: float) -> np.ndarray:
    """Bool edges of a slice; exchanging bright and dark changes nothing.

    They are where the Laplacian of a Gaussian changes its sign (Marr and Hildreth, 1980), on the steepest pixels.

    Args:
        image: ``(rows, columns)``; what is beyond the window, such as fat, counts as 1.
        spacing: mm of a pixel.
    """
    smooth = ndimage.gaussian_filter(image.clip(0, 1).astype(np.float32), SMOOTH / spacing)
    rising, slope = ndimage.laplace(smooth) > 0, np.hypot(*np.gradient(smooth))
    crosses = np.zeros(image.shape, bool)
    crosses[:-1] |= rising[:-1] != rising[1:]
    crosses[:, :-1] |= rising[:, :-1] != rising[:, 1:]
    seen = slope[slope > 1e-3]  # a pixel of the background has no slope
    return crosses & (slope > (np.quantile(seen, 1 - STEEPEST) if len(seen) else np.inf))


def middle(image: np.ndarray, spacing: float) -> tuple[int, int, int]:
    """A voxel in the middle of the head: of what is bright in its upper part, which leaves out the neck."""
    weight = image > 0.15
    height = np.flatnonzero(weight.any((0, 1)))
    if len(height):
        weight[:, :, : max(0, height[-1] - round(HEAD / spacing))] = False
    index = np.argwhere(weight)
    i, j, k = (index.mean(0) if len(index) else np.array(image.shape) / 2).round().astype(int).tolist()
    return min(i, image.shape[0] - 1), min(j, image.shape[1] - 1), min(k, image.shape[2] - 1)


def draw_subject(path: Path, title: str, looks: list[Look], spacing: float) -> None:
    """A row for each visit after the first: its edges on the first before and after registration, and the difference.

    A single visit is shown as it is.

    Args:
        path: PNG.
        title: over the picture.
        looks: of the visits.
        spacing: mm of a pixel.
    """
    first, others = looks[0], looks[1 : MOST + 1]
    columns = 9 if others else 3
    if left := len(looks) - 1 - len(others):
        title += f" ({left} more in quality.html)"
    with mpl.rc_context({"font.family": "DejaVu Sans"}):
        figure = Figure(
            figsize=(2.2 * columns, 2.6 * max(1, len(others)) + 0.5), facecolor="white", layout="constrained"
        )
        axes = figure.subplots(max(1, len(others)), columns, squeeze=False)
        for plane in range(3):
            if not others:
                show_slice(axes[0, plane], first.after[plane], np.eye(4) * spacing, PLANES[plane], plane)
            for row, look in zip(axes, others, strict=False):
                _compare(row[plane::3], first, look, plane, spacing)
        axes[0, 0].set_ylabel(first.name if not others else "", fontsize=8)
        for row, look in zip(axes, others, strict=False):
            row[0].set_ylabel(f"{look.name}\n{look.note}".strip(), fontsize=8)
        figure.suptitle(title, fontsize=11)
        with atomic_write(path) as part:
            figure.savefig(part, dpi=float(np.clip(100 / spacing, 80, 200)), format="png")


def _compare(axes: np.ndarray, first: Look, look: Look, plane: int, spacing: float) -> None:
    """One plane: edges before, edges after, difference."""
    affine, word = np.eye(4) * spacing, PLANES[plane]
    for axis, when, ground, lines in (
        (axes[0], "before", first.before[plane], look.before[plane]),
        (axes[1], "after", first.after[plane], look.after[plane]),
    ):
        shown = np.repeat(ground.clip(0, 1)[..., None], 3, -1)
        shown[edges(lines, spacing)] = EDGE
        show_slice(axis, shown, affine, f"{when}, {word}", plane)
    if look.difference:
        colours = {"cmap": "RdBu_r", "vmin": -DIFFERENT, "vmax": DIFFERENT}
        show_slice(axes[2], look.difference[plane], affine, f"difference, {word}", plane, **colours)
    else:
        caption(axes[2], f"difference, {word}")
        axes[2].text(0.5, 0.5, "another contrast", transform=axes[2].transAxes, ha="center", fontsize=8)


def draw_visit(path: Path, look: Look, spacing: float) -> None:
    """Three slices of a registered visit; those of one subject lie on each other.

    Args:
        path: JPEG.
        look: of the visit.
        spacing: mm of a pixel.
    """
    with mpl.rc_context({"font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(11, 4), facecolor="white", layout="constrained")
        for plane, axis in enumerate(figure.subplots(1, 3)):
            show_slice(axis, look.after[plane], np.eye(4) * spacing, "", plane)
        figure.suptitle(look.name, fontsize=10)
        with atomic_write(path) as part:
            figure.savefig(part, dpi=90, format="jpg", pil_kwargs={"quality": 85})


def draw_change(path: Path, title: str, ground: np.ndarray, factors: dict[str, np.ndarray], affine: np.ndarray) -> None:
    """A row for each later visit: where its volumes are larger (red) or smaller (blue) than at the first one.

    Args:
        path: PNG.
        title: over the picture.
        ground: ``(D, H, W)`` the first visit, about 1 in tissue.
        factors: name of a later visit → ``(D, H, W)`` factor of volume; 1 is no change.
        affine: ``(4, 4)`` of all of them.
    """
    spacing = float(np.linalg.norm(affine[:3, 0]))
    place = middle(ground, spacing)
    grey = np.repeat(ground.clip(0, 1)[..., None], 3, -1)
    shown = dict(list(factors.items())[:MOST])
    with mpl.rc_context({"font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(9, 3 * len(shown) + 0.6), facecolor="white", layout="constrained")
        for row, (name, factor) in zip(figure.subplots(len(shown), 3, squeeze=False), shown.items(), strict=True):
            change = ((factor - 1) / CHANGED).clip(-1, 1)
            colour = mpl.colormaps["RdBu_r"]((change + 1) / 2)[..., :3]
            veil = VEIL * (abs(change) ** 0.5 * (ground > AIR))[..., None]
            for plane, axis in enumerate(row):
                show(axis, grey * (1 - veil) + colour * veil, affine, place, PLANES[plane], plane, mark=None)
            row[0].set_ylabel(name, fontsize=8)
        left = f" ({len(factors) - len(shown)} visits more in change.tsv)" if len(factors) > len(shown) else ""
        figure.suptitle(f"{title}{left}: larger (red) and smaller (blue), full colour at {CHANGED:.0%}", fontsize=10)
        with atomic_write(path) as part:
            figure.savefig(part, dpi=100, format="png")
