"""Picture of a segmented subject: what the network saw, should have said, and said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lssl.pictures import axial
from lssl.segmentation.scores import SegmentedVisit

__all__ = ["draw_subject"]


def draw_subject(subject: str, visits: Sequence[SegmentedVisit], classes: int, path: Path) -> None:
    """A row per visit: image, truth, prediction, and where they differ; the axial slice that shows most classes.

    Args:
        subject: its name.
        visits: in time order.
        classes: number of classes but the background.
        path: PNG to write; the slice is the same for all visits.
    """
    index = _busiest(visits[0].predicted if visits[0].truth is None else visits[0].truth)
    palette = mpl.colormaps["gist_rainbow"](np.linspace(0, 1, classes))
    palette = np.concatenate([np.zeros((1, 4)), palette[np.random.default_rng(0).permutation(classes)]])
    with mpl.rc_context({"font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(13, 3.4 * len(visits)), layout="constrained")
        for row, visit in zip(figure.subplots(len(visits), 4, squeeze=False), visits, strict=True):
            here = min(index, visit.image.shape[2] - 1)
            age = "" if visit.age != visit.age else f", age {visit.age:.1f}"
            layers: dict[str, Tensor | None] = {f"{visit.session}{age}": None, "truth": visit.truth}
            layers |= {"prediction": visit.predicted, "difference (truth's colour)": _difference(visit)}
            for axes, (title, layer) in zip(row, layers.items(), strict=True):
                axes.set_title(title if layer is not None or axes is row[0] else f"no {title.split()[0]}", fontsize=10)
                axes.axis("off")
                axes.imshow(axial(visit.image, here), cmap="gray", vmin=0, vmax=1.1, interpolation="nearest")
                if layer is not None:
                    colours = palette[axial(layer.clamp_min(0), here).astype(int)]
                    colours[..., 3] *= 0.7
                    axes.imshow(colours, interpolation="nearest")
        figure.suptitle(f"{subject}: axial slice {index}, patient's right on the left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=70)


def _busiest(label: Tensor) -> int:
    """The slice with most classes, then with most labelled voxels."""
    several = torch.tensor([len(part.unique()) + float((part > 0).float().mean()) for part in label.unbind(2)])
    return int(several.argmax())


def _difference(visit: SegmentedVisit) -> Tensor | None:
    """The true class where the prediction differs; the predicted one where the truth is background."""
    if visit.truth is None:
        return None
    wrong = (visit.predicted != visit.truth) & (visit.truth >= 0)
    return torch.where(visit.truth > 0, visit.truth, visit.predicted).where(wrong, 0)
