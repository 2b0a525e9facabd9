"""Does a long run leak? Memory, open files and processes of ``lssl fit``, with workers, monitor and checkpoints.

python benchmarks/bench_soak.py [STEPS] [RECIPE]    # 2000 steps of longitudinal_infonce, tiny network

Prints every fiftieth step, and the slope over the second half of the run per 1000 steps with its standard error: what
is allocated once (kernels, caches of visits) has been allocated by then.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import lightning as L
import numpy as np

from lssl.cli.main import main

EVERY = 50
NETWORK = {"spatial_dims": 3, "in_channels": 1, "out_channels": 4, "features": [4] * 6, "norm": "batch"}
ROWS: list[tuple[int, float, float, int, int]] = []


def processes(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += processes(int(child))
    return found


def memory(pid: int) -> float:
    """Resident MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Soak(L.Callback):
    """Notes memory (own and of the workers), open files and processes."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % EVERY:
            return
        pids = processes(os.getpid())
        workers = sum(map(memory, pids[1:]))
        files = len(os.listdir("/proc/self/fd"))
        ROWS.append((trainer.global_step, memory(os.getpid()), workers, files, len(pids)))
        print("{:6d} {:9.0f} {:9.0f} {:6d} {:6d}".format(*ROWS[-1]), flush=True)


def slope(steps, values):
    """Per 1000 steps, and its standard error."""
    centred = steps - steps.mean()
    least = centred @ values / (centred @ centred)
    rest = values - values.mean() - least * centred
    return 1000 * least, 1000 * np.sqrt(rest @ rest / max(len(steps) - 2, 1) / (centred @ centred))


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    recipe = sys.argv[2] if len(sys.argv) > 2 else "longitudinal_infonce"
    sys.modules["bench_soak"] = sys.modules["__main__"]
    data = ["--data", "PhantomDataModule", "--data.init_args.subjects=12", "--data.init_args.size=40"]
    data += ["--data.init_args.spacing=5.0", "--data.init_args.num_workers=2", "--data.init_args.batch_size=2"]
    network = {"class_path": "monai.networks.nets.BasicUNet", "init_args": NETWORK}
    with tempfile.TemporaryDirectory() as folder:
        run = [f"--trainer.max_steps={steps}", f"--trainer.default_root_dir={folder}", "--trainer.precision=32-true"]
        run += ["--trainer.callbacks+=bench_soak.Soak", "--monitor.every=200", "--trainer.enable_progress_bar=false"]
        run += ["--trainer.check_val_every_n_epoch=20", "--views.size=32"]
        main(["fit", "--config", recipe, f"--backbone.network={json.dumps(network)}", *data, *run])
    late = np.array([row for row in ROWS if row[0] > steps / 2], float)
    for name, column in (("memory, MB", 1), ("memory of workers, MB", 2), ("open files", 3), ("processes", 4)):
        print("{:<22} {:+.2f} ± {:.2f} per 1000 steps".format(name, *slope(late[:, 0], late[:, column])))
