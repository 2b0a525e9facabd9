"""What commands take before they begin to work: seconds of processor time and of waiting, beside a plain LightningCLI.

python benchmarks/bench_start.py [repeats]

Processor time depends less on what else the machine does. The targets, on two quiet cores: ``lssl --help`` below 1 s,
``lssl show`` below 2 s, the first step of ``lssl fit`` below 12 s, every option listed no later than by LightningCLI.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PLAIN = """
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, DemoModel
LightningCLI(DemoModel, BoringDataModule, args=["fit", "--help"])
"""
NETWORK = (
    "{class_path: monai.networks.nets.BasicUNet, init_args: {in_channels: 1, out_channels: 4, features: [4,4,4,4,4,4]}}"
)
QUICK = [
    *("--config", "demo", "--trainer.max_steps", "1", "--trainer.callbacks", "null", "--monitor.every", "0"),
    *("--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false", "--backbone.network", NETWORK),
    *("--data.init_args.num_workers", "0", "--data.init_args.subjects", "4", "--trainer.log_every_n_steps", "1"),
]


def commands(place: Path) -> dict[str, list[str]]:
    lssl = [sys.executable, "-m", "lssl"]
    run = str(place / "run")
    return {
        "lssl --help": [*lssl, "--help"],
        "lssl fit --help": [*lssl, "fit", "--help"],
        "plain LightningCLI, fit --help": [sys.executable, "-c", PLAIN],
        "lssl fit --help=all": [*lssl, "fit", "--help=all"],
        "lssl fit, one step of a tiny network": [*lssl, "fit", *QUICK, "--trainer.default_root_dir", run],
        "lssl show": [*lssl, "show", run],
    }


def taken(command: list[str]) -> tuple[float, float]:
    """Processor time and time of one process that must succeed."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    passed, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-500:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, passed


def main() -> None:
    repeats = int((*sys.argv[1:], "3")[0])
    print(f"{'command':<40}{'CPU s':>8}{'s':>8}   median of {repeats}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as place:
        found: dict[str, list[tuple[float, float]]] = {}
        for number in range(repeats):
            folder = Path(place, str(number))
            for name, command in commands(folder).items():
                found.setdefault(name, []).append(taken(command))
    for name, times in found.items():
        cpu, passed = (statistics.median(values) for values in zip(*times, strict=True))
        print(f"{name:<40}{cpu:>8.2f}{passed:>8.2f}")


if __name__ == "__main__":
    main()
