"""Prints what one random 96³ crop of a 160×192×160 visit costs from each kind of file, and how large the files are.

Run as ``OMP_NUM_THREADS=1 python benchmarks/bench_reading.py [rounds]``. Kinds take turns in one run, files are warm,
one thread; compare ratios only. Of warm files, time is the processor's. The visits are phantoms at 1 mm with their
noise, whole heads and skull-stripped.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torchio as tio

from lssl.data import STEP, store
from lssl.data.nifti import automatic_foreground, intensity_range, scale
from lssl.data.store import StoredVisit, quantise, read_stored, write_stored
from lssl.datamodules.prepared import VisitFiles
from lssl.synthetic.phantom_image import scan
from lssl.utils.allocator import keep_freed_memory

SIZE, CROP = (160, 192, 160), 96
ROUNDS = int((*sys.argv[1:], "30")[0])


def visit(stripped: bool) -> tuple[np.ndarray, np.ndarray]:
    """Raw intensities as int16 would hold them, with Rician noise of 2 %, and the foreground."""
    made = scan(0, 0, 0, 0.0, SIZE, 1.0)
    rng = np.random.default_rng(0)
    image = 1000.0 * made.image.numpy()
    image = np.hypot(image + 20 * rng.standard_normal(SIZE), 20 * rng.standard_normal(SIZE))
    if stripped:
        brain = (made.label.numpy() > 0) & (made.label.numpy() < 500)
        image = image * brain
    image = np.rint(image).astype(np.float32)
    return image, automatic_foreground(image)


def write_all(folder: Path, image: np.ndarray, foreground: np.ndarray) -> dict[str, Path]:
    paths = {name: folder / f"visit.{name}" for name in ("nii.gz", "nii", "npy", "b2nd")}
    nifti = nib.Nifti1Image(image.astype(np.int16), np.eye(4))
    nib.save(nifti, paths["nii.gz"])
    nib.save(nifti, paths["nii"])
    limits = intensity_range(image, foreground)
    scaled = scale(image, foreground, limits)
    np.save(paths["npy"], quantise(scaled))
    write_stored(paths["b2nd"], scaled[None], foreground, None, np.eye(4), ["T1w"], [limits], {})
    return paths


def readers(paths: dict[str, Path]) -> dict[str, object]:
    """Each gives a contiguous float32 crop, opening the file anew; the last one gives what a worker sends, int16."""

    def part(start: np.ndarray) -> tuple[slice, ...]:
        return tuple(slice(a, a + CROP) for a in start.tolist())

    def nibabel(start: np.ndarray) -> torch.Tensor:
        voxels = np.asarray(nib.load(paths["nii.gz"]).dataobj)
        return torch.from_numpy(np.ascontiguousarray(voxels[part(start)], np.float32))

    def torchio(start: np.ndarray) -> torch.Tensor:
        return tio.ScalarImage(paths["nii.gz"]).data[0][part(start)].float().contiguous()

    def mapped(start: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(nib.load(paths["nii"]).dataobj[part(start)], np.float32))

    def npy(start: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(np.load(paths["npy"], mmap_mode="r")[part(start)], np.float32))

    def prepared(start: np.ndarray) -> torch.Tensor:
        return worker(start).float() * STEP

    def worker(start: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(read_stored(paths["b2nd"]).box(start.tolist(), [CROP] * 3)[0])

    cache = VisitFiles([str(paths["b2nd"])], budget=10**9)

    def cold(start: np.ndarray) -> torch.Tensor:
        """The system has forgotten the file, as of a cohort larger than memory, or on storage that is not cached."""
        with paths["b2nd"].open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return worker(start)

    def cached(start: np.ndarray) -> torch.Tensor:
        """The same, but the compressed visit is in the worker's memory: `cache_gb`."""
        with paths["b2nd"].open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return torch.from_numpy(cache.open(0).box(start.tolist(), [CROP] * 3)[0])

    return {
        "nii.gz, nibabel": nibabel,
        "nii.gz, torchio": torchio,
        "nii, nibabel mapped": mapped,
        "npy int16, mapped": npy,
        "prepared, with foreground, float32": prepared,
        "prepared, with foreground, int16 as sent": worker,
        "the same, file not in the system's cache": cold,
        "the same with cache_gb, after first reading": cached,
    }


class SlowFiles(VisitFiles):
    """Files on storage that takes 20 ms to open one and gives 50 MB a second; a box takes its share of the file."""

    def open(self, row: int) -> StoredVisit:
        size = Path(os.fsdecode(self._paths[row])).stat().st_size
        if self.budget <= 0:
            time.sleep(0.02 + size * CROP**3 / np.prod(SIZE) / 50e6)
        elif row not in self.kept:
            time.sleep(0.02 + size / 50e6)  # all of it, once
        return super().open(row)


def slow_storage(path: Path, visits: int = 6, epochs: int = 3) -> None:
    """Prints what a box takes in each epoch, with and without `cache_gb`."""
    rng = np.random.default_rng(0)
    for budget, name in ((0, "without"), (10**9, "with")):
        files, spent = SlowFiles([str(path)] * visits, budget), []
        for _ in range(epochs):
            begin = time.perf_counter()
            for row in range(visits):
                start = rng.integers(0, np.array(SIZE) - CROP + 1).tolist()
                files.open(row).box(start, [CROP] * 3)
            spent.append(f"{1e3 * (time.perf_counter() - begin) / visits:.1f}")
        print(f"  slow storage, simulated, {name} cache_gb: {', '.join(spent)} ms a box, epoch by epoch")


def checksums(path: Path) -> None:
    """Prints what a box costs when its chunks are verified, at the first reading of a process, and afterwards."""
    visit, start, spent = read_stored(path), ((np.array(SIZE) - CROP) // 2).tolist(), ([], [])
    for _ in range(ROUNDS):
        store._verified.clear()
        for times in spent:
            begin = time.process_time()
            visit.box(start, [CROP] * 3)
            times.append(1e3 * (time.process_time() - begin))
    first, later = map(np.median, spent)
    print(f"  checksums: {first:.1f} ms a box that is verified, {later:.1f} ms afterwards")


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as `lssl fit` does
    for kind in ("head", "skull-stripped"):
        image, foreground = visit(kind == "skull-stripped")
        with tempfile.TemporaryDirectory() as folder:
            paths = write_all(Path(folder), image, foreground)
            tried = readers(paths)
            rng = np.random.default_rng(0)
            spent: dict[str, list[float]] = {name: [] for name in tried}
            for _ in range(ROUNDS):
                start = rng.integers(0, np.array(SIZE) - CROP + 1)
                for name, read in tried.items():
                    clock = time.perf_counter if name.startswith("the same") else time.process_time
                    begin = clock()
                    read(start)
                    spent[name].append(clock() - begin)
            print(f"\n{kind}: foreground {foreground.mean():.0%} of the voxels")
            slowest = np.median(spent["nii.gz, nibabel"])
            for name, values in spent.items():
                middle = np.median(values)
                print(f"  {name:<42}{1e3 * middle:8.2f} ms {1 / middle:8.0f} crops/s {slowest / middle:7.1f} × nibabel")
            raw = 2 * image.size
            sizes = ", ".join(f"{name} {path.stat().st_size / raw:.2f}" for name, path in paths.items())
            print(f"  size of int16: {sizes}")
            error = read_stored(paths["b2nd"]).raw()[0] - image
            checksums(paths["b2nd"])
            slow_storage(paths["b2nd"])
            print(f"  storage error / sd inside: {error[foreground].std() / image[foreground].std():.1e}")


if __name__ == "__main__":
    main()
