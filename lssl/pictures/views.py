"""A pair, where its two views lie, and what the network sees."""

from __future__ import annotations

from pathlib import Path

from lssl.pictures.scene import Scene, draw_pair
from lssl.utils.canvas import figure

__all__ = ["draw_views"]


def draw_views(shown: Scene, path: Path) -> None:
    """Rows: the two visits with the box of their view, and the views; axial, then coronal.

    Args:
        shown: the pair.
        path: PNG.
    """
    with figure(path, 2, 4, "A held-out pair and its views; + is one place of the frame") as axes:
        draw_pair(axes[:, :2], shown, plane=0)
        draw_pair(axes[:, 2:], shown, plane=1)
