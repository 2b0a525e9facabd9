"""Does a long run leak? Memory, open files and processes of ``lssl fit``, with workers, monitor and checkpoints.

Memory is told apart: blocks in use (what a leak would grow), what the allocator holds of freed ones, and the process's
own resident memory, which is both and Python's. Batches of workers lie in shared memory and count as no one's own.

python benchmarks/bench_soak.py [STEPS] [RECIPE]    # 2000 steps of longitudinal_infonce, tiny network

Prints every fiftieth step, and the slope over the second half of the run per 1000 steps with its standard error: what
is allocated once (kernels, caches of visits) has been allocated by then.
"""

import ctypes
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
COLUMNS = ["own MB", "in use MB", "freed MB", "shared MB", "workers MB", "files", "processes"]
ROWS: list[tuple[float, ...]] = []


class Heap(ctypes.Structure):
    """glibc's ``struct mallinfo2``, all arenas together: bytes."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks")]
    _fields_ += [(name, ctypes.c_size_t) for name in ("fsmblks", "uordblks", "fordblks", "keepcost")]


mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Heap


def processes(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += processes(int(child))
    return found


def memory(pid: int) -> dict[str, float]:
    """Resident MB: ``RssAnon`` is the process's own, ``RssFile`` libraries, ``RssShmem`` batches in shared memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1.024e-3 for line in lines if line.startswith("Rss")}


class Soak(L.Callback):
    """Notes memory, of the workers too, open files and processes."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % EVERY:
            return
        pids = processes(os.getpid())
        own, workers = memory(pids[0]), sum(memory(pid)["RssAnon"] for pid in pids[1:])
        heap = mallinfo()
        used, freed = (heap.uordblks + heap.hblkhd) / 1e6, heap.fordblks / 1e6
        files = len(os.listdir("/proc/self/fd"))
        ROWS.append((trainer.global_step, own["RssAnon"], used, freed, own["RssShmem"], workers, files, len(pids)))
        print(("{:10.0f}" + 5 * "{:12.2f}" + 2 * "{:12.0f}").format(*ROWS[-1]), flush=True)


def slope(steps, values):
    """Per 1000 steps, and its standard error."""
    centred = steps - steps.mean()
    least = centred @ values / (centred @ centred)
    rest = values - values.mean() - least * centred
    return 1000 * least, 1000 * np.sqrt(rest @ rest / max(len(steps) - 2, 1) / (centred @ centred))


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    recipe = sys.argv[2] if len(sys.argv) > 2 else "longitudinal_infonce"
    print("      step" + "".join(f"{name:>12}" for name in COLUMNS))
    sys.modules["bench_soak"] = sys.modules["__main__"]
    data = ["--data", "PhantomDataModule", "--data.init_args.subjects=12", "--data.init_args.size=40"]
    data += ["--data.init_args.spacing=5.0", "--data.init_args.num_workers=2", "--data.init_args.batch_size=2"]
    network = {"class_path": "monai.networks.nets.BasicUNet", "init_args": NETWORK}
    with tempfile.TemporaryDirectory() as folder:
        run = [f"--trainer.max_steps={steps}", f"--trainer.default_root_dir={folder}", "--trainer.precision=32-true"]
        run += ["--trainer.callbacks+=bench_soak.Soak", "--monitor.every=200", "--trainer.enable_progress_bar=false"]
        run += ["--trainer.check_val_every_n_epoch=20", "--views.size=32"]
        main(["fit", "--config", recipe, f"--backbone.network={json.dumps(network)}", *data, *run])
    print("slopes over the second half, per 1000 steps:")
    late = np.array([row for row in ROWS if row[0] > steps / 2], float)
    for column, name in enumerate(COLUMNS, 1):
        print("{:<12} {:+.2f} ± {:.2f}".format(name, *slope(late[:, 0], late[:, column])))
