"""Picture of a pair: both visits, the true and the predicted change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lssl.pictures.overlay import label_colours
from lssl.utils.canvas import cut, figure, show
from lssl.views import geometry as geo

__all__ = ["draw_pair"]


def draw_pair(
    title: str, images: list[np.ndarray], affines: np.ndarray, truth: np.ndarray, predicted: np.ndarray, path: Path
) -> None:
    """One axial slice, that of most true change, or of most predicted change: earlier, later, truth, prediction.

    Args:
        title: subject and sessions.
        images: of both visits, ``(D, H, W)``, each on its own grid.
        affines: ``(2, 4, 4)``, index → frame in mm.
        truth: ``(D, H, W)`` classes on the grid of the later visit, below 0 where unknown.
        predicted: ``(D, H, W)`` classes on the same grid.
        path: PNG to write.
    """
    d, h, w = truth.shape
    matrix = torch.from_numpy(np.linalg.inv(affines[0]) @ affines[1])[None]
    earlier = geo.resample(torch.from_numpy(images[0])[None, None], matrix, truth.shape)[0, 0].numpy()
    changed = (truth > 0).sum((0, 1)) if (truth > 0).any() else (predicted > 0).sum((0, 1))
    index = int(changed.argmax()) if changed.any() else w // 2
    most = max(1, int(truth.max()), int(predicted.max()))
    palette = np.zeros((most + 1, 4))
    for value, colour in label_colours(range(1, most + 1)).items():
        palette[value] = (*colour, 0.8)
    later = images[1][:d, :h, :w]
    panels = {
        "earlier visit": (earlier, None),
        "later visit": (later, None),
        "true change": (later, truth),
        "prediction": (later, predicted),
    }
    with figure(path, 1, 4, f"{title}: axial slice {index}, patient's right on the left") as axes:
        for panel, (name, (image, label)) in zip(axes[0], panels.items(), strict=True):
            drawn = show(panel, image, affines[1], (0, 0, index), name, mark=None)
            if label is not None:
                colours = palette[cut(np.maximum(label, 0), (0, 0, index)).astype(int)]
                panel.imshow(colours, aspect=panel.get_aspect(), interpolation="nearest", extent=drawn.get_extent())
