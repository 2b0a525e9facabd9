"""Small label maps and an endless stream of heads from them."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from lssl.data.batch import Visit
from lssl.synthetic.phantom_image import scan
from lssl.synthetic.stream import Stream
from lssl.synthetic.stream_anatomy import Anatomy, map_anatomy

SIZE = (40, 44, 36)


@pytest.fixture(scope="module")
def maps(tmp_path_factory) -> Path:
    """Three label maps of phantoms, with soft tissue around the brain."""
    folder = tmp_path_factory.mktemp("maps")
    for number in range(3):
        made = scan(1, number, 0, 0.0, (56, 64, 52), 3.0)
        label = torch.where(made.head & (made.label == 0), 507, made.label.int()).numpy().astype(np.uint16)
        nib.save(nib.Nifti1Image(label, made.affine.numpy()), folder / f"sub-{number:02d}_dseg.nii.gz")
    return folder


@pytest.fixture(scope="module")
def anatomy(maps) -> Anatomy:
    return map_anatomy(maps / "sub-00_dseg.nii.gz")


def stream_of(anatomy: Anatomy, size=SIZE, spacing=4.0, change=1.0, same_contrast=0.5, lesions=0.0) -> Stream:
    return Stream(lambda _: anatomy, size, spacing, change, same_contrast, lesions, False)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def equal(first: Visit, second: Visit) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("image", "label", "affine"))
