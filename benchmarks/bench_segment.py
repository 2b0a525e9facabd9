"""Prints what a network of `release/brains` segments on real heads, without training on one: Dice; how visits agree.

Run as ``OMP_NUM_THREADS=1 python benchmarks/bench_segment.py RUN``. Needs the scans of
``LSSL_REAL_DATA`` (default ``../shared/data``): seven healthy heads (IXI, T1w) with automatic labels of DLMUSE, and
pairs of visits of patients with multiple sclerosis, registered, of T1w, T2w and FLAIR, without labels. No interval is
printed of the pairs: they are few. Labels of DLMUSE are a network's own output, so the Dice says how far two agree.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

import lssl
from lssl.data.nifti import automatic_foreground, read_image, read_label, scale
from lssl.segmentation.scores import dice_scores
from lssl.segmentation.volumes import largest_part

HERE = Path(__file__).parent
REAL = Path(os.environ.get("LSSL_REAL_DATA", HERE / "../../shared/data")) / "mri"
MUSE = yaml.safe_load((HERE / "muse.yaml").read_text())["model"]["init_args"]["classes"]


def segmented(task: Any, path: Path) -> tuple[Tensor, float, float]:
    """Classes of a file's voxels, ml of a voxel, and seconds."""
    begin = time.perf_counter()
    voxels, affine = read_image(str(path))
    image = torch.from_numpy(scale(voxels, automatic_foreground(voxels)))[None]
    with torch.no_grad():
        found = task.segment(image, torch.from_numpy(affine))
    return found, abs(np.linalg.det(affine[:3, :3])) / 1000, time.perf_counter() - begin


def healthy(task: Any) -> None:
    """Dice of the structures of each head, with islands and without."""
    names = list(MUSE)
    print(f"{'':<12}{''.join(f'{name[:11]:>12}' for name in names)}{'mean':>8}{'islands':>9}{'s':>5}")
    rows = []
    for path in sorted(REAL.glob("sub-ixi*/ses-*/anat/*_T1w.nii.gz")):
        subject = path.name.partition("_")[0]
        label = read_label(str(REAL / f"derivatives/labels/{subject}/anat/{subject}_desc-dlmuse_dseg.nii.gz"))
        truth = torch.zeros(label.shape, dtype=torch.long)
        for number, values in enumerate(MUSE.values(), 1):
            truth[torch.from_numpy(np.isin(label, values))] = number
        found, _, seconds = segmented(task, path)
        whole, kept = (dice_scores(each, truth, len(names) + 1)[1:] for each in (found, largest_part(found)))
        rows.append(kept.tolist())
        figures = "".join(f"{value:>12.3f}" for value in kept.tolist())
        print(f"{subject:<12}{figures}{kept.mean():>8.3f}{whole.mean():>9.3f}{seconds:>5.0f}", flush=True)
    means = np.mean(rows, axis=0)
    print(f"{'mean':<12}{''.join(f'{value:>12.3f}' for value in means)}{means.mean():>8.3f}")


def pairs(task: Any) -> None:
    """Volumes at both visits, and the Dice between the visits, of each structure."""
    for first in sorted(REAL.glob("sub-oms*/ses-01/anat/*.nii.gz")):
        second = Path(str(first).replace("ses-01", "ses-02"))
        if not second.is_file():
            continue
        (one, ml, _), (two, _, _) = (segmented(task, path) for path in (first, second))
        one, two = largest_part(one), largest_part(two)
        agree = dice_scores(one, two, len(MUSE) + 1)[1:].tolist()
        print(first.name.replace("_ses-01", "").removesuffix(".nii.gz"))
        for number, name in enumerate(MUSE, 1):
            before, after = (float((each == number).sum()) * ml for each in (one, two))
            change = 100 * (after - before) / max(1e-6, (before + after) / 2)
            print(f"  {name:<26}{before:>8.1f}{after:>8.1f} ml {change:>+7.1f} %   STCS {agree[number - 1]:.3f}")


def main() -> None:
    task: Any = lssl.load(sys.argv[1])
    healthy(task)
    pairs(task)


if __name__ == "__main__":
    main()
