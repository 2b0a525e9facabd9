"""Prints how far `lssl prepare`'s rigid maps between real visits are from those that came with the data.

    OMP_NUM_THREADS=1 python benchmarks/bench_registration.py

Needs ``LSSL_REAL_DATA`` (default ``../shared/data``): scans as they left the scanner (``raw``), and copies of the same
scans that their publishers' maps brought into a space per subject (``mri``). A scan is easily registered to its own
copy; two such maps make the reference between two scans, which does not come from a comparison of these two. It is
itself true to some 0.2 mm. One thread, two minutes.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import numpy as np

from lssl.data.nifti import automatic_foreground, read_image
from lssl.prepare.register import register
from lssl.prepare.volumes import Volume

REAL = Path(os.environ.get("LSSL_REAL_DATA", Path(__file__).parent / "../../shared/data"))


def volume(path: Path) -> Volume:
    """A scan with its head."""
    voxels, affine = read_image(str(path))
    return Volume(voxels, affine, automatic_foreground(voxels))


def main() -> None:
    """Prints a row per pair of visits."""
    scans = {path.name.partition(".")[0]: volume(path) for path in sorted((REAL / "raw").rglob("*.nii.gz"))}
    to_copy = {}
    for name, scan in scans.items():
        subject, session, _ = name.split("_")
        copy = f"{name.replace('sub-', 'sub-oms')}.nii.gz"
        to_copy[name] = register(
            scan, volume(REAL / "mri" / subject.replace("sub-", "sub-oms") / session / "anat" / copy)
        ).matrix
    print(f"{'mm':<44}{'median':>8}{'largest':>9}{'disagreement':>14}{'s':>5}")
    for one, other in itertools.combinations(scans, 2):
        if one.split("_")[0] != other.split("_")[0] or one.split("_")[1] == other.split("_")[1]:
            continue
        start = time.perf_counter()
        match = register(scans[one], scans[other])
        seconds = time.perf_counter() - start
        wrong = match.matrix - np.linalg.inv(to_copy[other]) @ to_copy[one]
        points = scans[one].points(2000)
        errors = np.linalg.norm(points @ wrong[:3, :3].T + wrong[:3, 3], axis=1)
        names = f"{one} {other.partition('_')[2]}"
        print(
            f"{names:<44}{np.median(errors):>8.2f}{errors.max():>9.2f}{match.disagreement:>14.2f}{seconds:>5.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
