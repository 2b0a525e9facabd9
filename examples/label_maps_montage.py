"""Draws docs/label_maps.png: two subjects of one real label map each, at two visits. Run it with the folder of maps.

``python examples/label_maps_montage.py ../shared/data/labelmaps``
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from lssl.data.batch import Visit
from lssl.datamodules.label_maps import LabelMapDataModule

SUBJECTS, VISITS = (1, 17), (0, 2)  # a map as it is, and a bent one
PLANES = ((2, 52), (1, 48), (0, 31))  # axis and voxel
COLOURS = ("000000", "d1603d", "3a6ea5", "2fb3c9", "4c9f50", "e0b020", "8fc93a", "f0e442", "b26ea8", "a0563b")


def plane(visit: Visit, axis: int, where: int, labels: bool) -> np.ndarray:
    """A slice of the image or of the labels; up is front or top."""
    flat = (visit.label if labels else visit.image[0]).select(axis, where).numpy().T[::-1]
    return np.array([[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in COLOURS])[flat] / 255 if labels else flat


def main(root: str) -> None:
    """A row per visit; three planes, each as image and as labels."""
    torch.set_num_threads(1)
    data = LabelMapDataModule(root, subjects=max(SUBJECTS) + 1)
    data.setup()
    figure, axes = plt.subplots(4, 6, figsize=(11.5, 8.4), gridspec_kw={"wspace": 0.02, "hspace": 0.08})
    figure.subplots_adjust(0.002, 0.002, 0.998, 0.97)
    shown = [(subject, visit) for subject in SUBJECTS for visit in VISITS]
    for row, (subject, visit) in zip(axes, shown, strict=True):
        here = data.table[(data.table["index"] == subject) & (data.table["visit"] == visit)]
        made = data.read(int(here.index[0]))
        panels = [plane(made, *place, labels) for place in PLANES for labels in (False, True)]
        for axis, panel in zip(row, panels, strict=True):
            axis.imshow(panel, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.axis("off")
        row[0].set_title(
            f"{here['subject'].iloc[0]}, visit {visit + 1}, age {made.age:.1f}", fontsize=9, loc="left", pad=2
        )
    file = io.BytesIO()
    figure.savefig(file, dpi=80)
    Image.open(file).convert("RGB").quantize(128).save(Path(__file__).parents[1] / "docs/label_maps.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
