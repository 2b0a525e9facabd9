"""Prints how long 100 000 visits of 20 000 subjects take from CSV to drawable pairs, and what memory they add.

Once from a CSV of images, once from the table of a prepared folder, whose files are not opened. Run as
``python benchmarks/bench_pairs.py``.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from lssl.data.batch import Visit
from lssl.data.datamodule import PairDataModule, PairSampler
from lssl.data.tables import csv_table
from lssl.datamodules.prepared import WANTED, PreparedDataModule
from lssl.utils.errors import InputError


class CsvOnly(PairDataModule):
    """Pairs of a CSV whose images are never opened."""

    def __init__(self, path: Path, **options) -> None:
        super().__init__(**options)
        self.path = path

    def visit_table(self) -> pd.DataFrame:
        return csv_table(self.path)[0]

    def read(self, row: int) -> Visit:
        raise InputError("There is no such file.")


def write_csv(path: Path, subjects: int = 20_000, visits: int = 100_000) -> None:
    """Subjects in random order, five visits on average."""
    rng = np.random.default_rng(0)
    subject = np.sort(np.concatenate([np.arange(subjects), rng.integers(subjects, size=visits - subjects)]))
    number = np.arange(visits) - np.flatnonzero(np.diff(subject, prepend=-1))[subject]
    table = pd.DataFrame({"subject": [f"sub-{value:06d}" for value in subject]})
    table["session"] = [f"ses-{value:02d}" for value in number]
    table["image"] = table["subject"] + "/" + table["session"] + "/anat/" + table["subject"] + "_T1w.nii.gz"
    table["days"] = number * 180 + rng.integers(90, size=visits)
    table.sample(frac=1, random_state=0).to_csv(path, index=False)


def write_prepared(folder: Path) -> None:
    """The same visits as `lssl prepare` lists them."""
    write_csv(folder / "visits.csv")
    table = pd.read_csv(folder / "visits.csv")
    table = table.assign(
        age=(60 + table["days"] / 365.25).round(4), site="", size_d=180, size_h=220, size_w=190, flags=""
    )
    table = table.assign(channels="T1w")
    table.to_csv(folder / "visits.csv", index=False)
    (folder / "dataset.json").write_text("{}")


def timed(name: str, function, repeats: int = 3):
    best = min(_once(function) for _ in range(repeats))
    print(f"{name:<44} {1e3 * best:8.1f} ms")
    return function()


def _once(function) -> float:
    start = time.process_time()  # of the processor: other work on the machine does not count
    function()
    return time.process_time() - start


def megabytes() -> float:
    """Peak memory of the process so far."""
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def main() -> None:
    for prepared in (False, True):  # each in a process of its own, so that the peak of one is not the other's
        child = multiprocessing.get_context("spawn").Process(target=measure, args=(prepared,))
        child.start()
        child.join()


def measure(prepared: bool) -> None:
    print("prepared folder" if prepared else "CSV of images")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "visits.csv"
        write, target = (write_prepared, Path(folder)) if prepared else (write_csv, path)
        writer = multiprocessing.Process(target=write, args=(target,))  # its memory must not count here
        writer.start()
        writer.join()
        before = megabytes()

        from lssl.datamodules import prepared as module

        module.known_problems = lambda paths, kind: {}  # there are no files
        module.unopenable = lambda paths: {}

        def drawable() -> PairDataModule:
            source = PreparedDataModule(folder, pairs="any") if prepared else CsvOnly(path, pairs="any")
            source.setup()
            source.train_dataloader()
            return source

        drawable()
        print(f"{'peak memory growth, CSV to drawable':<44} {megabytes() - before:8.1f} MiB")
        timed("CSV to table", lambda: csv_table(path, columns=WANTED if prepared else None))
        source = timed("CSV to drawable", drawable)
        sampler = source.train_dataloader().sampler
        assert isinstance(sampler, PairSampler)
        timed(f"draw of one epoch ({len(sampler)} pairs)", lambda: list(sampler))
        source.every_pair = True
        every = source.train_dataloader().sampler
        timed(f"draw of one epoch ({len(every)} pairs)", lambda: list(every))


if __name__ == "__main__":
    main()
