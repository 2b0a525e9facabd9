"""Four small label maps, and a cohort made from them."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from lssl.datamodules.label_maps import LabelMapDataModule
from lssl.synthetic.phantom_image import scan

REAL = Path(os.environ.get("LSSL_REAL_DATA", Path(__file__).parents[2] / "../shared/data")) / "labelmaps"
COUNT, COARSE, SPACING = 4, 3.0, 2.7  # maps, their mm and those of the visits


def write(path: Path, label: np.ndarray, affine: np.ndarray) -> None:
    nib.save(nib.Nifti1Image(label, affine), path)


@pytest.fixture(scope="module")
def maps(tmp_path_factory) -> Path:
    """Four label maps of phantoms, with soft tissue around the brain; one is stored from right to left."""
    folder = tmp_path_factory.mktemp("maps")
    for number in range(COUNT):
        made = scan(1, number, 0, 0.0, (56, 64, 52), COARSE)
        label = torch.where(made.head & (made.label == 0), 507, made.label.int()).numpy().astype(np.uint16)
        affine = made.affine.numpy().copy()
        if number == 1:
            label = label[::-1]
            affine[:3, 3] += affine[:3, 0] * (len(label) - 1)
            affine[:3, 0] *= -1
        write(folder / f"sub-{number:02d}_dseg.nii.gz", label, affine)
    return folder


def make(maps: Path, **options) -> LabelMapDataModule:
    data = LabelMapDataModule(maps, **{"subjects": 6, "size": (56, 64, 60), "spacing": SPACING, **options})
    data.setup()
    return data


@pytest.fixture(scope="module")
def data(maps) -> LabelMapDataModule:
    return make(maps)


def row(data: LabelMapDataModule, index: int, visit: int) -> int:
    return int(data.table.index[(data.table["index"] == index) & (data.table["visit"] == visit)][0])
