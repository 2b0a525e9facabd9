"""Prints how far `lssl prepare`'s rigid maps are from the truth, between real visits and between planted ones.

    OMP_NUM_THREADS=1 python benchmarks/bench_registration.py

Needs ``LSSL_REAL_DATA`` (default ``../shared/data``): scans as they left the scanner (``raw``), and copies of the same
scans that their publishers' maps brought into a space per subject (``mri``). A scan is easily registered to its own
copy; two such maps make the reference between two scans, which does not come from a comparison of these two. It is
itself true to some 0.2 mm. The planted pairs are T1 and FLAIR of label maps, the FLAIR turned by up to 12 degrees about
each axis, moved by up to 12 mm, in slices of 4 mm, with bias and noise. One thread, four minutes.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation

from lssl.data import STEP
from lssl.data.nifti import automatic_foreground, read_image
from lssl.datamodules import LabelMapDataModule
from lssl.prepare.register import register
from lssl.prepare.volumes import Volume

REAL = Path(os.environ.get("LSSL_REAL_DATA", Path(__file__).parent / "../../shared/data"))


def volume(path: Path) -> Volume:
    """A scan with its head."""
    voxels, affine = read_image(str(path))
    return Volume(voxels, affine, automatic_foreground(voxels))


def row(name: str, first: Volume, second: Volume, truth: np.ndarray) -> None:
    """Registers a pair and prints its errors over the head."""
    start = time.perf_counter()
    match = register(first, second)
    seconds, wrong = time.perf_counter() - start, match.matrix - truth
    errors = np.linalg.norm(first.points(2000) @ wrong[:3, :3].T + wrong[:3, 3], axis=1)
    print(
        f"{name:<44}{np.median(errors):>8.2f}{errors.max():>9.2f}{match.disagreement:>14.2f}{seconds:>5.0f}", flush=True
    )


def real() -> None:
    """A row per pair of real visits."""
    scans = {path.name.partition(".")[0]: volume(path) for path in sorted((REAL / "raw").rglob("*.nii.gz"))}
    to_copy = {}
    for name, scan in scans.items():
        subject, session, _ = name.split("_")
        copy = f"{name.replace('sub-', 'sub-oms')}.nii.gz"
        to_copy[name] = register(
            scan, volume(REAL / "mri" / subject.replace("sub-", "sub-oms") / session / "anat" / copy)
        ).matrix
    for one, other in itertools.combinations(scans, 2):
        (subject, session, _), (other_subject, other_session, _) = one.split("_"), other.split("_")
        if subject == other_subject and session != other_session:
            truth = np.linalg.inv(to_copy[other]) @ to_copy[one]
            row(f"{one} {other.partition('_')[2]}", scans[one], scans[other], truth)


def planted(shape: tuple[int, int, int] = (200, 220, 40), thick: int = 4) -> None:
    """A row per label map, whose truth is known."""
    data = LabelMapDataModule(
        root=REAL / "labelmaps", subjects=15, size=[160, 192, 160], spacing=1.2, contrasts=["T1", "FLAIR"]
    )
    data.setup("fit")
    random = np.random.default_rng(0)
    for number in range(0, 24, 6):
        visit = data.read(number)
        t1, flair = visit.image.double().numpy() * (STEP if visit.image.dtype == torch.int16 else 1)
        own, motion, turned, slices = visit.affine.numpy(), np.eye(4), np.diag([0.9, 0.9, thick, 1.0]), np.eye(4)
        own[:3, 3] = -own[:3, :3] @ ((np.array(t1.shape) - 1) / 2)
        turned[:3, 3] = -np.diag(turned)[:3] * shape / 2
        motion[:3, :3] = Rotation.from_euler("xyz", random.uniform(-12, 12, 3), degrees=True).as_matrix()
        motion[:3, 3] = random.uniform(-12, 12, 3)
        slices[2, 2:] = 1 / thick, (1 - thick) / (2 * thick)  # thin ones, of which a slice is the mean
        there = np.linalg.inv(own) @ np.linalg.inv(motion) @ turned @ slices
        thin = affine_transform(flair, there[:3, :3], there[:3, 3], (*shape[:2], shape[2] * thick), order=1)
        x, y, z = np.meshgrid(*[np.linspace(-1, 1, side) for side in shape], indexing="ij")
        seen = thin.reshape(*shape, thick).mean(-1) * (1 + 0.3 * x - 0.2 * y + 0.2 * z**2)
        images = [(t1 + random.normal(0, 0.03, t1.shape), own), (seen + random.normal(0, 0.02, shape), turned)]
        first, second = (
            Volume(voxels.astype(np.float32), affine, automatic_foreground(voxels)) for voxels, affine in images
        )
        row(f"{data.table['subject'].iat[number]}, T1 to FLAIR", first, second, motion)


def main() -> None:
    """Prints both tables as one."""
    print(f"{'mm':<44}{'median':>8}{'largest':>9}{'disagreement':>14}{'s':>5}")
    real()
    planted()


if __name__ == "__main__":
    main()
