"""Segmentations over their image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from lssl.utils.canvas import cut, figure, show

__all__ = ["draw_segmentations", "label_colours"]


def label_colours(labels: Sequence[int]) -> dict[int, tuple[float, float, float]]:
    """Label → colour, far apart in hue for labels that follow one another; the same for one list of labels."""
    steps = (np.arange(len(labels)) * 0.6180339887) % 1.0
    return {label: mpl.colors.hsv_to_rgb((hue, 0.75, 1.0)) for label, hue in zip(labels, steps, strict=True)}  # type: ignore[misc]


def draw_segmentations(
    image: np.ndarray,
    maps: Mapping[str, np.ndarray],
    affine: np.ndarray,
    path: Path,
    point: Sequence[float] | None = None,
    names: Mapping[int, str] | None = None,
    title: str = "",
) -> None:
    """A row for each label map, axial, coronal and sagittal through one point: filled, with outlines.

    Args:
        image: ``(D, H, W)``, background 0 and brightest tissue about 1.
        maps: title → ``(D, H, W)`` integers, 0 for the background (-1: not labelled); the image's grid.
        affine: ``(4, 4)``, index → frame in mm (RAS+).
        path: PNG.
        point: index to cut through; ``None`` takes the slices that hold most labelled voxels of the first map.
        names: of labels, for the legend; those that have none stay out of it.
        title: over the figure.
    """
    present = sorted({int(label) for map_ in maps.values() for label in np.unique(map_) if label > 0})
    colours = label_colours(present)
    where = _busiest(next(iter(maps.values()))) if point is None else point
    with figure(path, len(maps), 3, title) as axes:
        for row, (name, labels) in enumerate(maps.items()):
            for plane, text in enumerate(("axial", "coronal", "sagittal")):
                axis = axes[row, plane]
                show(axis, image, affine, where, f"{name}, {text}", plane, mark=None)
                _fill(axis, cut(labels, where, plane), colours)
        handles = [
            Line2D([], [], color=colours[k], linewidth=5, label=v) for k, v in (names or {}).items() if k in colours
        ]
        if handles:
            axes[0, 0].figure.legend(
                handles=handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize=8
            )


def _fill(axis: Axes, labels: np.ndarray, colours: Mapping[int, tuple[float, float, float]]) -> None:
    """Transparent inside, opaque on the border to any other label."""
    border = np.zeros(labels.shape, bool)
    for axis_ in (0, 1):
        for shift in (-1, 1):
            border |= np.roll(labels, shift, axis_) != labels
    painted = np.zeros((*labels.shape, 4))
    for label, colour in colours.items():
        painted[labels == label, :3] = colour
        painted[labels == label, 3] = 0.35
    painted[(painted[..., 3] > 0) & border, 3] = 0.9
    axis.imshow(painted, aspect=axis.get_aspect(), interpolation="nearest")


def _busiest(labels: np.ndarray) -> list[int]:
    """Along each axis the slice with most labelled voxels."""
    inside = labels > 0
    return [int(inside.sum(tuple(a for a in range(3) if a != axis)).argmax()) for axis in range(3)]
