"""One run on 1, 2 and 4 processes (DDP, gloo): pairs a second, compute hours, and processor time.

python benchmarks/bench_processes.py [steps] [processes …]

Each process has one thread and its own batch. Compute hours are processes times time, so where there are fewer
processors than processes they grow; the processor's time of a pair shows what distribution itself costs.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_start import NETWORK

from lssl.cli.start import BRIEF
from lssl.runs.outputs import read_cost

PAIRS = 2


def run(processes: int, steps: int, folder: Path) -> tuple[float, float]:
    """Processor seconds of all processes, and seconds."""
    options = ["--config", "longitudinal_infonce", "--data", "PhantomDataModule", *BRIEF]
    options += ["--views.size", "32", "--backbone.network", NETWORK, "--trainer.max_steps", str(steps)]
    options += ["--data.init_args.size", "40", "--data.init_args.num_workers", "0", "--trainer.accelerator", "cpu"]
    options += ["--data.init_args.batch_size", str(PAIRS), "--trainer.devices", str(processes)]
    options += [
        "--trainer.precision",
        "32-true",
        "--trainer.strategy",
        "ddp" if processes > 1 else "auto",
        "--trainer.default_root_dir",
        str(folder),
    ]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "lssl", "fit", *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    after, passed = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, passed


def main(steps: int = 60, *counts: int) -> None:
    """Twice as many steps tell the start from the steps."""
    print(f"{os.cpu_count()} processors, batches of {PAIRS} pairs of 32³, a narrow network, {steps} steps")
    print(f"{'processes':>9}{'pairs/s':>9}{'hours':>10}{'hours of 1000 pairs':>21}{'CPU ms a pair':>15}")
    with tempfile.TemporaryDirectory() as place:
        for processes in counts or (1, 2, 4):
            folders = [Path(place, f"{processes}-{number}") for number in range(2)]
            few, many = (run(processes, many, folder) for many, folder in zip((steps, 2 * steps), folders, strict=True))
            cost = read_cost(folders[1])
            assert cost is not None
            pairs = 2 * steps * PAIRS * processes
            cpu = 1000 * (many[0] - few[0]) / (pairs / 2)
            hours = f"{cost.device_hours:>10.5f}{1000 * cost.device_hours / pairs:>21.5f}"
            print(f"{processes:>9}{cost.pairs_per_second:>9.2f}{hours}{cpu:>15.1f}", flush=True)


if __name__ == "__main__":
    main(*[int(argument) for argument in sys.argv[1:]])
