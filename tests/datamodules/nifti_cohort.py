"""A BIDS folder of small heads."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from lssl.datamodules.nifti import NiftiDataModule

SHAPE = (18, 20, 16)
AFFINE = np.diag([1.5, 1.0, 2.0, 1.0])
AFFINE[:3, 3] = (-10, -9, -8)


def head(shape=SHAPE, seed: int = 0) -> np.ndarray:
    """A bright noisy ellipsoid with a dark hollow, in faint noise."""
    rng = np.random.default_rng(seed)
    axes = [np.linspace(-1, 1, length) for length in shape]
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij")))
    image = np.where(radius < 0.8, 400.0, 0.0) * (radius > 0.2)
    return (image + 10 * rng.random(shape)).astype(np.float32)


def save(path: Path, voxels: np.ndarray | None = None, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(head() if voxels is None else voxels, affine), path)
    return path


def image_path(root: Path, subject: str, session: str, suffix: str = "T1w") -> Path:
    return root / f"sub-{subject}/ses-{session}/anat/sub-{subject}_ses-{session}_{suffix}.nii.gz"


@pytest.fixture
def cohort(tmp_path) -> Path:
    """Two subjects with two visits each, two with one."""
    visits = [("a", "01"), ("a", "02"), ("b", "M000"), ("b", "M012"), ("c", "01"), ("d", "01")]
    for seed, (subject, session) in enumerate(visits):
        save(image_path(tmp_path, subject, session), head(seed=seed))
    return tmp_path


def setup(root: Path, **options) -> NiftiDataModule:
    source = NiftiDataModule(root, **options)
    source.setup()
    return source
