"""Slices on axes, in radiological convention, with orientation letters and a scale; numpy and matplotlib only.

The viewer looks from the feet or at the face: the patient's right is on the left; up is the front on axial slices and
the top of the head on the others; sagittal slices look to the left. All arrays are in canonical orientation (first
axis to the right, second to the front, third up). Letters come from the affine, so that a mirrored or turned view says
where its sides truly are. Figures are opaque and white: readable on light and dark pages alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lssl.utils.files import atomic_write

__all__ = ["GREY", "MARK", "caption", "cut", "figure", "planes", "show", "show_slice", "spot"]

GREY, MARK = "#888888", "#ffcc00"
ACROSS, UP = (0, 0, 1), (1, 2, 2)  # array axes of the axial, coronal and sagittal picture; both run backwards


@contextmanager
def figure(path: Path, rows: int, columns: int, title: str, panel: float = 3.2) -> Iterator[np.ndarray]:
    """Axes ``(rows, columns)`` to draw on; the PNG is there whole when all is drawn, or not at all.

    Args:
        path: PNG.
        rows: of panels.
        columns: of panels.
        title: over the figure.
        panel: side of a panel in inches.
    """
    with mpl.rc_context({"font.family": "DejaVu Sans", "axes.edgecolor": GREY}):
        drawn = Figure(figsize=(panel * columns, panel * rows + 0.5), facecolor="white", layout="constrained")
        axes = drawn.subplots(rows, columns, squeeze=False)
        yield axes
        drawn.suptitle(title, fontsize=11)
        with atomic_write(path) as part:
            drawn.savefig(part, dpi=90, format="png")


def planes(volume: np.ndarray, index: tuple[int, int, int]) -> list[np.ndarray]:
    """Axial, coronal and sagittal slices ``(rows, columns)`` of ``(D, H, W)``, as a viewer shows them."""
    i, j, k = index
    return [volume[::-1, ::-1, k].T, volume[::-1, j, ::-1].T, volume[i, ::-1, ::-1].T]


def cut(volume: np.ndarray, point: Sequence[float], plane: int = 0) -> np.ndarray:
    """The slice of ``(D, H, W)`` or ``(D, H, W, 3)`` through an index: 0 axial, 1 coronal, 2 sagittal."""
    i, j, k = (int(np.clip(round(float(p)), 0, n - 1)) for p, n in zip(point, volume.shape[:3], strict=True))
    if volume.ndim == 3:
        return planes(volume, (i, j, k))[plane]
    return np.stack([planes(volume[..., channel], (i, j, k))[plane] for channel in range(volume.shape[3])], -1)


def spot(shape: Sequence[int], point: Sequence[float], plane: int = 0) -> tuple[float, float]:
    """Where an index lies on :func:`cut`, as (column, row)."""
    across, up = ACROSS[plane], UP[plane]
    return shape[across] - 1 - float(point[across]), shape[up] - 1 - float(point[up])


def show(
    axes: Axes,
    volume: np.ndarray,
    affine: np.ndarray,
    point: Sequence[float],
    title: str = "",
    plane: int = 0,
    mark: str | None = MARK,
    **look: Any,
) -> AxesImage:
    """Draws a slice with letters and a scale, and marks the point; gives matplotlib's image.

    Args:
        axes: to draw on.
        volume: ``(D, H, W)``, or ``(D, H, W, 3)`` colours.
        affine: ``(4, 4)``, index → frame in mm (RAS+).
        point: index to cut through.
        title: over the slice.
        plane: 0 axial, 1 coronal, 2 sagittal.
        mark: colour of the cross at the point; ``None`` draws none.
        **look: for ``imshow``; grey from 0 to 1.1 by default.
    """
    drawn = show_slice(axes, cut(volume, point, plane), affine, title, plane, **look)
    if mark:
        axes.plot(*spot(volume.shape, point, plane), "+", color=mark, markersize=12, markeredgewidth=1.8)
    return drawn


def show_slice(
    axes: Axes, image: np.ndarray, affine: np.ndarray, title: str = "", plane: int = 0, **look: Any
) -> AxesImage:
    """Draws a slice of :func:`planes` with letters and a scale.

    Args:
        axes: to draw on.
        image: ``(rows, columns)``, or ``(rows, columns, 3)`` colours.
        affine: ``(4, 4)`` of its volume, index → frame in mm (RAS+).
        title: over the slice.
        plane: 0 axial, 1 coronal, 2 sagittal.
        **look: for ``imshow``; grey from 0 to 1.1 by default.
    """
    drawing: dict[str, Any] = {"cmap": "gray", "vmin": 0.0, "vmax": 1.1, "interpolation": "nearest"} | look
    step = np.linalg.norm(affine[:3, :3], axis=0)
    across, up = ACROSS[plane], UP[plane]
    drawn = axes.imshow(image, aspect=step[up] / step[across], **drawing)
    _letters(axes, affine, plane)
    _scale(axes, image.shape[1] * step[across])
    caption(axes, title)
    return drawn


def caption(axes: Axes, title: str) -> None:
    """A title, and no ticks."""
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])


def _letters(axes: Axes, affine: np.ndarray, plane: int) -> None:
    right, top = -affine[:3, ACROSS[plane]], affine[:3, UP[plane]]
    places = (((0.03, 0.5), -right), ((0.97, 0.5), right), ((0.5, 0.96), top), ((0.5, 0.04), -top))
    for place, direction in places:
        _text(axes, place, _letter(direction))


def _letter(direction: np.ndarray) -> str:
    """The side of the body that a direction of the frame points to."""
    axis = int(np.abs(direction).argmax())
    return ("RAS" if direction[axis] > 0 else "LPI")[axis]


def _scale(axes: Axes, width: float) -> None:
    """A bar of a round length, a quarter of the picture's width or less."""
    length = max((mm for mm in (1, 2, 5, 10, 20, 50) if mm <= width / 4), default=1)
    share = length / width
    axes.plot([0.05, 0.05 + share], [0.06, 0.06], color=MARK, linewidth=2, transform=axes.transAxes)
    _text(axes, (0.05 + share / 2, 0.105), f"{length} mm", size=6.5)


def _text(axes: Axes, place: tuple[float, float], text: str, size: float = 8) -> None:
    drawn = axes.text(*place, text, transform=axes.transAxes, color=MARK, fontsize=size, va="center", ha="center")
    drawn.set_bbox({"facecolor": "black", "alpha": 0.45, "pad": 1.0, "edgecolor": "none"})
