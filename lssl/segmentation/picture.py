"""Picture of a segmented subject: image, truth and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lssl.pictures.overlay import label_colours
from lssl.segmentation.scores import SegmentedVisit
from lssl.utils.canvas import cut, figure, show

__all__ = ["draw_subject"]


def draw_subject(subject: str, visits: Sequence[SegmentedVisit], classes: int, path: Path) -> None:
    """A row per visit: image, truth, prediction and their difference, on the axial slice with most classes.

    Args:
        subject: its name.
        visits: in time order.
        classes: number of classes but the background.
        path: PNG to write; the slice is the same for all visits.
    """
    index = _busiest(visits[0].predicted if visits[0].truth is None else visits[0].truth)
    palette = np.zeros((classes + 1, 4))
    for label, colour in label_colours(range(1, classes + 1)).items():
        palette[label] = (*colour, 0.7)
    with figure(path, len(visits), 4, f"{subject}: axial slice {index}, patient's right on the left") as axes:
        for row, visit in zip(axes, visits, strict=True):
            age = "" if visit.age != visit.age else f", age {visit.age:.1f}"
            layers: dict[str, Tensor | None] = {f"{visit.session}{age}": None, "truth": visit.truth}
            layers |= {"prediction": visit.predicted, "difference (truth's colour)": _difference(visit)}
            image, affine, point = visit.image.numpy(), visit.affine.numpy(), (0, 0, index)
            for panel, (title, layer) in zip(row, layers.items(), strict=True):
                missing = layer is None and panel is not row[0]
                drawn = show(panel, image, affine, point, f"no {title.split()[0]}" if missing else title, mark=None)
                if layer is not None:
                    colours = palette[cut(layer.clamp_min(0).numpy(), point).astype(int)]
                    panel.imshow(colours, aspect=panel.get_aspect(), interpolation="nearest", extent=drawn.get_extent())


def _busiest(label: Tensor) -> int:
    """The slice with most classes, then with most labelled voxels."""
    several = torch.tensor([len(part.unique()) + float((part > 0).float().mean()) for part in label.unbind(2)])
    return int(several.argmax())


def _difference(visit: SegmentedVisit) -> Tensor | None:
    """The true class where the prediction differs, or the predicted class where the truth is background."""
    if visit.truth is None:
        return None
    wrong = (visit.predicted != visit.truth) & (visit.truth >= 0)
    return torch.where(visit.truth > 0, visit.truth, visit.predicted).where(wrong, 0)
