"""Draws docs/synthetic_brains.png: 24 random pairs of the endless stream. Run it with a folder of label maps.

``python examples/synthetic_brains_sheet.py ../shared/data/labelmaps``
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image

from lssl.datamodules.synthetic_brains import SyntheticBrainsDataModule

PAIRS, COLUMNS = 24, 4


def main(root: str) -> None:
    """Four pairs a row; of each visit an axial and a coronal slice through the middle of the box."""
    torch.set_num_threads(1)
    data = SyntheticBrainsDataModule(root, pairs_per_epoch=PAIRS, batch_size=1, size=88, spacing=2.0)
    data.setup()
    rows = PAIRS // COLUMNS
    figure, axes = plt.subplots(rows, 4 * COLUMNS, figsize=(16, rows * 1.05), facecolor="black")
    figure.subplots_adjust(0, 0, 1, 1, 0.02, 0.02)
    for number, batch in enumerate(data.train_dataloader()):
        row, first = number // COLUMNS, 4 * (number % COLUMNS)
        for visit in range(2):
            image = batch.images[0, visit, 0]
            for place, plane in enumerate((image[:, :, image.shape[2] // 2], image[:, image.shape[1] // 2])):
                axis = axes[row, first + 2 * visit + place]
                axis.imshow(plane.T, origin="lower", cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for axis in axes.flat:
        axis.axis("off")
    file = io.BytesIO()
    figure.savefig(file, dpi=80, facecolor="black")
    target = Path(__file__).parents[1] / "docs/synthetic_brains.png"
    Image.open(file).convert("L").quantize(64).save(target, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
