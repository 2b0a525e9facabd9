"""Prints what it costs to make a visit of `LabelMapDataModule`, to read it back, and to make one with TorchIO.

Run as ``OMP_NUM_THREADS=1 python benchmarks/bench_label_maps.py``. Kinds take turns in one run, one thread;
compare ratios only. Needs the label maps of ``LSSL_REAL_DATA`` (default ``../shared/data``).

Measured on one core of a shared machine, 80×104×88 voxels, a visit made = 1: a bent map's 1.3, the same from a prepared
file 0.02, from memory 0.001, TorchIO's transforms to the same end (without time or correspondence) 5. So the module
makes visits when they are first asked for and keeps them; files would save a cohort of 45 visits ten seconds, once.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchio as tio

from lssl.data.store import read_stored, write_stored
from lssl.datamodules.label_maps import LabelMapDataModule

REAL = Path(os.environ.get("LSSL_REAL_DATA", Path(__file__).parents[1] / "../shared/data")) / "labelmaps"
ROUNDS = 8


def torchio_generator(path: Path) -> tio.Compose:
    """Deforms a map, cuts the same grid from it and draws an image: what the module does in one sampling."""
    steps = [
        tio.RandomElasticDeformation(num_control_points=7, max_displacement=5),
        tio.RandomLabelsToImage(label_key="label"),
        tio.RandomBlur(std=(0.3, 0.7)),
        tio.RandomBiasField(0.3),
        tio.RandomNoise(std=(0.01, 0.03)),
    ]
    return tio.Compose([tio.ToCanonical(), tio.CropOrPad((80, 104, 88)), *steps])


def main() -> None:
    torch.set_num_threads(1)
    data = LabelMapDataModule(REAL, subjects=18, cache=False)
    kept = LabelMapDataModule(REAL, subjects=18)
    for module in (data, kept):
        module.setup()
    number = {(i, v): r for r, (i, v) in enumerate(zip(data.table["index"], data.table["visit"], strict=True))}
    first, bent = number[0, 2], number[15, 2]
    visit = kept.read(first)
    kept.read(bent)
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "visit.b2nd"
        write_stored(
            stored,
            visit.image.numpy(),
            visit.foreground.numpy(),
            visit.label.numpy(),
            visit.affine.numpy(),
            ["T1w"],
            [(0.0, 1.0)],
            {},
        )
        generator = torchio_generator(data.maps[0])
        subject = tio.Subject(label=tio.LabelMap(data.maps[0]))
        subject.load()
        tried = {
            "made, the map's own shape": lambda: data.read(first),
            "made, a bent map": lambda: data.read(bent),
            "read back from a prepared file, whole": lambda: read_stored(stored).box([0, 0, 0], [80, 104, 88]),
            "from memory": lambda: kept.read(first),
            "TorchIO: elastic, labels to image, blur, bias, noise": lambda: generator(subject),
        }
        spent: dict[str, list[float]] = {name: [] for name in tried}
        for turn in range(ROUNDS + 1):
            for name, run in tried.items():
                begin = time.process_time()
                run()
                if turn:
                    spent[name].append(time.process_time() - begin)
    one = np.median(spent["made, the map's own shape"])
    for name, values in spent.items():
        print(f"  {name:<55}{1e3 * np.median(values):8.1f} ms {np.median(values) / one:8.3f} × a visit made")


if __name__ == "__main__":
    main()
