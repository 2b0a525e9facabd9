"""Draws docs/phantom.png: three phantom subjects at three visits.

``python examples/phantom_montage.py``
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from lssl.datamodules.phantom import PhantomDataModule
from lssl.synthetic.phantom_image import Scan

SUBJECTS, VISITS, FINE = (1, 3, 8), (0, 1, 2), 1.2
# Labels of one colour; the right side is paler.
GROUPS = {
    "#3a6ea5": (2, 41),
    "#d1603d": (3, 42),
    "#2fb3c9": (4, 43),
    "#7d6b99": (7, 46),
    "#b26ea8": (8, 47),
    "#4c9f50": (10, 49),
    "#e0b020": (11, 50),
    "#8fc93a": (12, 51),
    "#5e7f2e": (13, 52),
    "#a0563b": (16,),
    "#f0e442": (17, 53),
    "#f07fb0": (18, 54),
    "#1f8296": (14,),
    "#1d7185": (15,),
    "#3a3a3a": (24,),
}


def plane(scan: Scan, axis: int, position: float, labels: bool = False) -> np.ndarray:
    """The slice across ``axis`` at ``position`` mm; up is front or top."""
    volume = scan.label if labels else scan.image
    where = round((position - scan.affine[axis, 3].item()) / scan.affine[axis, axis].item())
    flat = volume.select(axis, where).numpy().T[::-1]
    return colours()[flat] if labels else flat


def colours() -> np.ndarray:
    """A colour per label."""
    table = np.zeros((64, 3))
    for name, labels in GROUPS.items():
        colour = np.array([int(name[start : start + 2], 16) for start in (1, 3, 5)]) / 255
        for label, white in zip(labels, (0, 0.35), strict=False):
            table[label] = colour + white * (1 - colour)
    return table


def main() -> None:
    """Three rows of subjects; columns: an axial plane at three visits, then other planes, labels and 3 mm voxels."""
    torch.set_num_threads(1)
    fine, coarse = PhantomDataModule(size=round(192 / FINE), spacing=FINE), PhantomDataModule()
    ages = fine.visit_table().set_index(["index", "visit"])["age"]
    figure, axes = plt.subplots(3, 8, figsize=(15.2, 6.1), gridspec_kw={"wspace": 0.02, "hspace": 0.10})
    figure.subplots_adjust(0.002, 0.002, 0.998, 0.96)
    for row, subject in zip(axes, SUBJECTS, strict=True):
        scans = [fine.scan(subject, visit) for visit in VISITS]
        first, last = scans[0], scans[-1]
        panels = [plane(scan, 2, 8) for scan in scans]
        titles = [f"visit {visit + 1}, age {ages[subject, visit]:.1f}" for visit in VISITS]
        panels += [plane(last, 1, -12), plane(last, 0, 4), plane(first, 0, 27), plane(first, 2, 8, labels=True)]
        titles += ["coronal, visit 3", "sagittal, visit 3", "sagittal, visit 1", "labels, visit 1"]
        panels, titles = [*panels, plane(coarse.scan(subject, 0), 2, 8)], [*titles, "visit 1 at the default 3 mm"]
        for axis, panel, title in zip(row, panels, titles, strict=True):
            axis.imshow(
                panel, cmap="gray", vmin=0, vmax=1, interpolation="nearest" if panel.ndim == 3 else "antialiased"
            )
            axis.set_title(title, fontsize=8, pad=2)
            axis.axis("off")
    file = io.BytesIO()
    figure.savefig(file, dpi=100)
    few = np.concatenate([np.linspace(0, 1, 64)[:, None].repeat(3, 1), colours()])  # a third of the bytes
    palette = Image.new("P", (1, 1))
    palette.putpalette((255 * few).round().astype(np.uint8).tobytes())
    picture = Image.open(file).convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE)
    picture.save(Path(__file__).parents[1] / "docs/phantom.png", optimize=True)


if __name__ == "__main__":
    main()
