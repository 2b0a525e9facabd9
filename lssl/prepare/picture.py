"""One picture per subject to look at: visits woven into a checkerboard, before and after registration.

Radiological convention: the patient's right is on the left of axial and coronal slices; anterior is up on axial slices
and on the left of sagittal ones.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lssl.utils.files import atomic_write

__all__ = ["checkerboard", "draw_subject", "planes"]

MOST = 6  # rows of a picture
SIDE = 24.0  # mm of a checkerboard's field
HEAD = 150.0  # mm from the top of the head that hold the brain


def planes(volume: np.ndarray, index: tuple[int, int, int]) -> list[np.ndarray]:
    """Axial, coronal and sagittal slices ``(rows, columns)`` of ``(D, H, W)``, as a viewer shows them."""
    i, j, k = index
    return [volume[::-1, ::-1, k].T, volume[::-1, j, ::-1].T, volume[i, ::-1, ::-1].T]


def checkerboard(one: np.ndarray, other: np.ndarray, side: int) -> np.ndarray:
    """Fields of ``side`` pixels from two slices in turn."""
    rows, columns = np.indices(one.shape)
    return np.where((rows // side + columns // side) % 2 == 0, one, other)


def _show(axis: Axes, image: np.ndarray, plane: int, title: str) -> None:
    axis.imshow(image, cmap="gray", vmin=0, vmax=1.0, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    if title:
        axis.set_title(title, fontsize=9)
    ends = ("A", "P") if plane == 2 else ("R", "L")
    for x, text, side in ((0.02, ends[0], "left"), (0.98, ends[1], "right")):
        axis.text(x, 0.5, text, transform=axis.transAxes, color="#ffcc00", fontsize=8, va="center", ha=side)


def draw_subject(
    path: Path,
    title: str,
    names: list[str],
    before: tuple[list[np.ndarray], float],
    after: tuple[list[np.ndarray], float],
    notes: list[str],
) -> None:
    """A row for every visit after the first, woven with the first: three planes before, three after.

    A single visit is shown as it is.

    Args:
        path: PNG.
        title: over the picture.
        names: of the visits.
        before: scaled images ``(D, H, W)`` in scanner coordinates on one grid, and its spacing in mm.
        after: the same, registered.
        notes: beside each row after its name, such as its correlation; one per visit.
    """
    parts = {"": after} if len(names) == 1 else {"before, ": before, "after, ": after}
    rows = min(max(1, len(names) - 1), MOST)
    with mpl.rc_context({"font.family": "DejaVu Sans", "axes.edgecolor": "#888888"}):
        figure = Figure(figsize=(6.75 * len(parts), 2.7 * rows + 0.7), facecolor="white", layout="constrained")
        axes = figure.subplots(rows, 3 * len(parts), squeeze=False)
        for row in range(rows):
            visit = min(row + 1, len(names) - 1)
            for number, (when, (images, spacing)) in enumerate(parts.items()):
                # Through the middle of the first visit's head: the same anatomy before and after.
                centre, side = _middle(images[0], spacing), max(2, round(SIDE / spacing))
                pairs = zip(planes(images[0], centre), planes(images[visit], centre), strict=True)
                for plane, (one, other) in enumerate(pairs):
                    text = when + ("axial", "coronal", "sagittal")[plane] if row == 0 else ""
                    _show(axes[row, 3 * number + plane], checkerboard(one, other, side), plane, text)
            label = names[0] if len(names) == 1 else f"{names[0]} / {names[visit]}"
            axes[row, 0].set_ylabel(f"{label}\n{notes[visit]}".strip(), fontsize=8)
        figure.suptitle(title, fontsize=11)
        with atomic_write(path) as part_path:
            figure.savefig(part_path, dpi=80, format="png")


def _middle(image: np.ndarray, spacing: float) -> tuple[int, int, int]:
    """A voxel in the middle of the head: of what is bright in its upper part, which leaves out the neck."""
    weight = image > 0.15
    height = np.flatnonzero(weight.any((0, 1)))
    if len(height):
        weight[:, :, : max(0, height[-1] - round(HEAD / spacing))] = False
    index = np.argwhere(weight)
    i, j, k = (index.mean(0) if len(index) else np.array(image.shape) / 2).round().astype(int).tolist()
    return min(i, image.shape[0] - 1), min(j, image.shape[1] - 1), min(k, image.shape[2] - 1)
