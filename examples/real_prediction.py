"""Draws docs/oms01.png: the tissue that `lssl predict` wrote for both visits of a real subject, over their images.

``python examples/real_prediction.py ../shared/data/mri runs/tissue/predict/mri sub-oms01``;
docs/results/finetuning.md says how the segmentations were made.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from lssl.pictures.overlay import draw_segmentations

NAMES = {1: "grey matter", 2: "white matter", 3: "ventricles", 4: "other brain"}


def main(images: str, segmentations: str, subject: str) -> None:
    """A row per visit, at the same place of both."""
    rows, point = [], None
    for source in sorted(Path(images, subject).glob("ses-*/anat/*_T1w.nii.gz")):
        session = source.parent.parent.name
        name = source.name.replace("_T1w.nii.gz", "_desc-lssl_dseg.nii.gz")
        written = nib.load(Path(segmentations, subject, session, "anat", name))
        label = np.asarray(written.dataobj).astype(int)
        image = nib.load(source).get_fdata()
        if point is None:
            point = [round(values.mean()) for values in np.nonzero(label == 2)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "visit.png"
            draw_segmentations(image / np.quantile(image, 0.999), {session: label}, written.affine, path, point, NAMES)
            rows.append(np.asarray(Image.open(path).convert("RGB")))
    Image.fromarray(np.concatenate(rows)).quantize(128).save(
        Path(__file__).parents[1] / "docs/oms01.png", optimize=True
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
