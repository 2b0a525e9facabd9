"""Prints how well the fields of `lssl prepare --nonrigid` follow the tissue, beside the rigid frame and other tools.

Run as ``OMP_NUM_THREADS=1 python benchmarks/bench_change.py [subjects] [seed]``; some 2 minutes a subject. Visits of
the phantom and of the label maps, 2 mm voxels, some 3 to 5 years apart, every other subject ageing as in Alzheimer's
disease, are registered rigidly as `lssl prepare` does. Their true correspondence is known. Errors are medians in mm
over labelled places of the first visit; ventricle border: ventricle voxels that touch another class. The demons are
SimpleITK's diffeomorphic ones, from the first visit to the second, smoothed by σ 1.5 voxels, on images with matched
histograms. Where antspyx is installed, ANTs' SyN stands beside them (``SyNOnly`` with its defaults, the same images and
direction, no affine stage). Volume changes are of the field alone, of the first visit's labels; fluid is no tissue.
Needs the label maps of ``LSSL_REAL_DATA`` (default ``../shared/data``); without them, only the phantom is measured.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from scipy.ndimage import map_coordinates, minimum_filter

from lssl.datamodules.label_maps import LabelMapDataModule
from lssl.datamodules.phantom import PhantomDataModule
from lssl.prepare.change import tissue_fields
from lssl.prepare.register import register
from lssl.prepare.transforms import half_way
from lssl.prepare.velocity import determinant
from lssl.prepare.volumes import FrameGrid, Volume, common_grid, resample, resample_label, to_itk

REAL = Path(os.environ.get("LSSL_REAL_DATA", Path(__file__).parents[1] / "../shared/data")) / "labelmaps"
PLACES = 20_000
STRUCTURES = {  # of the phantom, by FreeSurfer's numbers, and of the label maps, by class
    "phantom": {"ventricle": (4, 43), "hippocampus": (17, 53), "cortex": (3, 42), "white matter": (2, 41)},
    "label maps": {"ventricle": (3,), "hippocampus": (7,), "cortex": (1,), "white matter": (2,)},
}
SHOWN = ("all", "ventricle border", "hippocampus", "cortex", "white matter")


def cohort(name: str, subjects: int, seed: int) -> Any:
    """Pairs of visits with known correspondence."""
    if name == "phantom":
        module: Any = PhantomDataModule(
            max(6, subjects), visits=2, size=(88, 112, 104), spacing=2.0, interval=4.0, fast=0.5, seed=seed
        )
    else:
        module = LabelMapDataModule(REAL, visits=2, interval=3.0, fast=0.5, seed=seed)
    module.setup()
    return module


def demons(images: list[np.ndarray], grid: FrameGrid) -> np.ndarray:
    """Displacement ``(3, D, H, W)`` in mm of the first image's places, by ITK's diffeomorphic demons."""
    fixed, moving = (to_itk(image, grid.affine) for image in images)
    moving, found = sitk.HistogramMatching(moving, fixed, 128, 16, True), None
    for shrink, steps in ((2, 60), (1, 40)):
        pair = [sitk.BinShrink(image, [shrink] * 3) for image in (fixed, moving)]
        method = sitk.DiffeomorphicDemonsRegistrationFilter()
        method.SetNumberOfIterations(steps)
        method.SetSmoothDisplacementField(True)
        method.SetStandardDeviations(1.5)
        found = method.Execute(*pair, *([] if found is None else [sitk.Resample(found, pair[0])]))
    return sitk.GetArrayFromImage(found).T * np.array([-1.0, -1.0, 1.0])[:, None, None, None]


def syn(images: list[np.ndarray], grid: FrameGrid) -> np.ndarray | None:
    """The same by ANTs' symmetric normalisation; ``None`` without it."""
    try:
        import ants
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{number}.nii.gz" for number in range(2)]
        for path, image in zip(paths, images, strict=True):
            nib.save(nib.Nifti1Image(image, grid.affine), path)
        fixed, moving = map(ants.image_read, paths)
        found = ants.registration(fixed, moving, "SyNOnly", initial_transform="Identity", random_seed=0)
        (warp,) = [path for path in found["fwdtransforms"] if path.endswith(".nii.gz")]
        field = np.asarray(nib.load(warp).dataobj)[..., 0, :]
        for path in {*found["fwdtransforms"], *found["invtransforms"]}:
            Path(path).unlink(missing_ok=True)
    return np.moveaxis(field, -1, 0) * np.array([-1.0, -1.0, 1.0])[:, None, None, None]


def measure(module: Any, name: str, index: int, errors: dict[str, dict[str, list[np.ndarray]]]) -> list[dict[str, Any]]:
    """Adds the errors of one subject, and returns its figures by method."""
    table = module.table
    rows = [int(np.flatnonzero((table["index"] == index) & (table["visit"] == visit))[0]) for visit in (0, 1)]
    visits = [module.read(row) for row in rows]
    volumes = [Volume(v.image[0].numpy(), v.affine.numpy(), v.foreground.numpy()) for v in visits]
    maps = half_way(2, {(0, 1): register(*volumes).matrix})
    labels = visits[0].label.numpy()
    start = time.process_time()
    change = tissue_fields(volumes, maps, 2.0, 8.0)
    spent = {"rigid frame": 0.0, "lssl": time.process_time() - start}
    grid = common_grid(volumes, maps, 2.0, 8.0)
    fields = {"rigid frame": np.zeros((3, *grid.size), np.float32), "lssl": change.between(0, 1)}
    images = [resample(volume, grid, matrix) for volume, matrix in zip(volumes, maps, strict=True)]
    start = time.process_time()
    fields["demons"] = demons(images, grid)
    spent["demons"] = time.process_time() - start
    start = time.process_time()
    if (field := syn(images, grid)) is not None:
        fields["SyN"], spent["SyN"] = field, time.process_time() - start
    places = np.argwhere(labels > 0)
    places = places[np.random.default_rng(index).permutation(len(places))[:PLACES]]
    points, true = _truth(module, places, volumes[0].affine, maps, rows)
    ventricle = np.isin(labels, STRUCTURES[name]["ventricle"])
    kinds = {kind: np.isin(labels, classes)[tuple(places.T)] for kind, classes in STRUCTURES[name].items()}
    kinds["ventricle border"] = (ventricle & ~minimum_filter(ventricle, 3))[tuple(places.T)]
    kinds["all"] = np.ones(len(places), bool)
    at = (points - grid.affine[:3, 3]) / grid.spacing
    on_grid = resample_label(labels, volumes[0].affine, grid, maps[0])
    truth = [module.volumes(index, visit) for visit in (0, 1)]
    figures = []
    for method, field in fields.items():
        moved = points + np.stack([map_coordinates(axis, at.T, order=1, mode="nearest") for axis in field], 1)
        far = np.linalg.norm(moved - true, axis=1)
        for kind in SHOWN:
            errors.setdefault(method, {}).setdefault(kind, []).append(far[kinds[kind]])
        factor = determinant(field, grid.spacing)
        figures.append({"method": method, "seconds": spent[method], "folds": float((factor <= 0)[on_grid > 0].mean())})
        figures[-1] |= _percent(name, on_grid, factor, truth)
    return figures


def _truth(
    module: Any, places: np.ndarray, affine: np.ndarray, maps: list[np.ndarray], rows: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Places of the first visit in the half-way frame, and where their tissue lies at the second."""
    own = places @ affine[:3, :3].T + affine[:3, 3]
    there = module.correspond(torch.from_numpy(own), *rows).numpy()
    inverse = [np.linalg.inv(matrix) for matrix in maps]
    first, second = (p @ m[:3, :3].T + m[:3, 3] for p, m in zip((own, there), inverse, strict=True))
    return first, second


def _percent(name: str, label: np.ndarray, factor: np.ndarray, truth: list[dict[int, float]]) -> dict[str, float]:
    """Percent volume change by the field and in truth, of ventricles, hippocampi and all that is no fluid."""
    fluid = (*STRUCTURES[name]["ventricle"], 24)
    groups = {kind: STRUCTURES[name][kind] for kind in ("ventricle", "hippocampus")}
    groups["tissue"] = tuple(value for value in truth[0] if value not in fluid)
    found = {}
    for kind, classes in groups.items():
        before, after = (sum(volumes.get(value, 0.0) for value in classes) for volumes in truth)
        found[f"{kind} true"] = 100 * (after / before - 1)
        found[kind] = 100 * (float(factor[np.isin(label, classes)].mean()) - 1)
    return found


def main() -> None:
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    given = [int(text) for text in sys.argv[1:]]
    subjects, seed = [*given, *(4, 0)[len(given) :]]
    for name in ("phantom", "label maps") if REAL.is_dir() else ("phantom",):
        module, errors, figures = cohort(name, subjects, seed), {}, []
        for index in range(subjects):
            figures += measure(module, name, index, errors)
        print(f"\n{name}, {subjects} pairs, seed {seed}: median error, mm; mean change, % (true)")
        print(f"| | {' | '.join(SHOWN)} | 95 % | folds | s | ventricle % | hippocampus % | tissue % |")
        print(f"|---|{'--:|' * (len(SHOWN) + 6)}")
        for method, kinds in errors.items():
            own = [row for row in figures if row["method"] == method]
            mean = {key: np.mean([row[key] for row in own]) for key in own[0] if key != "method"}
            middle = [f"{np.median(np.concatenate(kinds[kind])):.2f}" for kind in SHOWN]
            changes = [f"{mean[k]:+.1f} ({mean[f'{k} true']:+.1f})" for k in ("ventricle", "hippocampus", "tissue")]
            far = np.percentile(np.concatenate(kinds["all"]), 95)
            cells = [*middle, f"{far:.2f}", f"{mean['folds']:.3g}", f"{mean['seconds']:.0f}", *changes]
            print(f"| {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
