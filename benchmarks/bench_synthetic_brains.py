"""Prints how many pairs of the endless stream one core makes a second, beside a bare network's step on each.

Run as ``OMP_NUM_THREADS=1 python benchmarks/bench_synthetic_brains.py``. Both take turns in one run, one thread;
compare ratios only. Needs the label maps of ``LSSL_REAL_DATA`` (default ``../shared/data``).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
from monai.networks.nets import BasicUNet

from lssl.datamodules.synthetic_brains import SyntheticBrainsDataModule

REAL = Path(os.environ.get("LSSL_REAL_DATA", Path(__file__).parents[1] / "../shared/data")) / "labelmaps"
ROUNDS = 20


def main() -> None:
    torch.set_num_threads(1)
    network = BasicUNet(3, 1, 16, features=(16, 32, 64, 128, 256, 16))
    optimizer = torch.optim.AdamW(network.parameters())
    for size in (64, 96):
        data = SyntheticBrainsDataModule(REAL, pairs_per_epoch=ROUNDS + 40, batch_size=1, size=size)
        data.setup()
        pairs = list(data.train_dataloader().sampler)
        for row, later, seed in pairs[:40]:  # reads the maps
            data.read_visits((row, later), None, seed)
        spent: dict[str, list[float]] = {"a pair": [], "a step": []}
        for row, later, seed in pairs[40:]:
            begin = time.perf_counter()
            first, second = data.read_visits((row, later), None, seed)
            middle = time.perf_counter()
            network(torch.stack([first.image, second.image])).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            spent["a pair"].append(middle - begin)
            spent["a step"].append(time.perf_counter() - middle)
        pair, step = (float(np.mean(values)) for values in spent.values())
        print(f"  {size}³: {1 / pair:6.1f} pairs/s and core; a step of the network takes {step / pair:.1f} × as long")


if __name__ == "__main__":
    main()
