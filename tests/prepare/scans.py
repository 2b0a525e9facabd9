"""Small heads for preparation: an asymmetric procedural brain that can be scanned anywhere, at any resolution."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from lssl.data.nifti import automatic_foreground
from lssl.prepare.volumes import Volume

REAL = Path(os.environ.get("LSSL_REAL_DATA", Path(__file__).parents[2] / "../shared/data"))


def anatomy(points: np.ndarray, seed: int = 0) -> np.ndarray:
    """Brightness of a made-up head at places ``(..., 3)`` in mm (RAS): skull, brain with folds, two dark ventricles."""
    rng = np.random.default_rng(seed)
    x, y, z = np.moveaxis(points / np.array([70.0, 85.0, 70.0]), -1, 0)
    radius = np.sqrt(x**2 + y**2 + z**2)
    value = 300.0 * (radius < 1) - 200.0 * ((radius > 0.86) & (radius < 0.93))
    inside = radius < 0.84
    for _ in range(24):
        where = rng.uniform(-0.6, 0.6, 3)
        width = rng.uniform(0.06, 0.16)
        blob = np.exp(-((x - where[0]) ** 2 + (y - where[1]) ** 2 + (z - where[2]) ** 2) / (2 * width**2))
        value = value + inside * blob * rng.choice([-140.0, 160.0])
    dark = ((x - 0.22) / 0.1) ** 2 + (y / 0.3) ** 2 + ((z - 0.1) / 0.15) ** 2 < 1
    return np.where(dark, 60.0, value)


def rigid(degrees: float, mm: float, seed: int = 0) -> np.ndarray:
    """A turn about a random axis through the origin and a shift, RAS mm."""
    rng = np.random.default_rng(seed)
    axis, shift = rng.standard_normal(3), rng.standard_normal(3)
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(np.radians(degrees) * axis / np.linalg.norm(axis)).as_matrix()
    matrix[:3, 3] = mm * shift / np.linalg.norm(shift)
    return matrix


def scan(
    motion: np.ndarray | None = None,
    spacing: tuple[float, float, float] = (4.0, 4.0, 4.0),
    seed: int = 0,
    noise: float = 6.0,
    bias: float = 0.0,
    subject: int = 0,
    lowest: float = -96.0,
) -> Volume:
    """A head that moved by ``motion`` (place in the head → place in the scanner), as the scanner sees it."""
    size = [round(192 / side) for side in spacing[:2]] + [round((96 - lowest) / spacing[2])]
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-96, -96, lowest]
    index = np.stack(np.meshgrid(*[np.arange(length) for length in size], indexing="ij"), -1)
    places = index @ affine[:3, :3].T + affine[:3, 3]
    inverse = np.linalg.inv(np.eye(4) if motion is None else motion)
    image = anatomy(places @ inverse[:3, :3].T + inverse[:3, 3], subject)
    image = gaussian_filter(image, 0.5) * np.exp(bias * places[..., 0] / 96)
    rng = np.random.default_rng(seed)
    image = np.hypot(image + noise * rng.standard_normal(image.shape), noise * rng.standard_normal(image.shape))
    image = image.astype(np.float32)
    return Volume(image, affine, automatic_foreground(image))


def save(volume: Volume, path: Path, dtype: type = np.int16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.rint(volume.voxels).astype(dtype), volume.affine)
    image.set_sform(volume.affine, 1)
    nib.save(image, path)
    return path


def image_path(root: Path, subject: str, session: str, suffix: str = "T1w") -> Path:
    return root / f"sub-{subject}/ses-{session}/anat/sub-{subject}_ses-{session}_{suffix}.nii.gz"
