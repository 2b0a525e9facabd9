"""How cost grows: log-log slopes of processor time in voxels, batch, taps, points and subjects.

python benchmarks/bench_growth.py [repeats]

A slope of 1 means twice the time for twice as much. Voxels, batch: a whole step of dense InfoNCE on a narrow network.
Taps and points: its terms alone, forward and backward, on maps made once. Subjects: from the table to drawable pairs,
and one epoch's order. The least of some repeats counts, as other work on the machine only adds.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from bench_operations import batch
from bench_pairs import CsvOnly, write_csv

from lssl import Backbone, ViewSampler
from lssl.networks.backbone import unet
from lssl.strategies.longitudinal_local import InfoNCE, LongitudinalLocal

TAPS = ("encoder.0", "encoder.1", "encoder.2", "decoder.3", "decoder.2", "decoder.1", "decoder.0", "encoder.3")
OFF = {"variance": 0.0, "covariance": 0.0, "orthogonality": 0.0, "reconstruction": 0.0}
FEW = ("decoder.2", "decoder.1", "decoder.0")


def local(side: int, taps: Sequence[str] = FEW, samples: int = 256) -> LongitudinalLocal:
    options = {"encoder_taps": (), "decoder_taps": list(taps), "samples": samples, "loss_weights": OFF}
    heads = {"projector_layers": 2, "hidden": 128, "projection": 64, "objective": InfoNCE}
    backbone = Backbone(unet(features=(8, 8, 16, 16, 16, 8)))
    return LongitudinalLocal(backbone, views=ViewSampler(side), **options, **heads).train()


def step(side: int, pairs: int) -> Callable[[], None]:
    """Views, terms and gradients."""
    strategy, data = local(side), batch(pairs, side + 8)

    def run() -> None:
        first, second = strategy.draw_views(data)
        strategy.total(strategy.terms(first, second, data)).backward()

    return run


def terms(taps: Sequence[str], samples: int) -> Callable[[], None]:
    """The same without views and network."""
    strategy, data = local(48, taps, samples), batch(2, 56)
    first, second = strategy.draw_views(data)
    with torch.no_grad():
        maps = strategy.backbone(torch.cat([first.image, second.image]), list(taps))
    leaves = {tap: values.requires_grad_() for tap, values in maps.items()}
    strategy.backbone.forward = lambda *_, **__: leaves

    def run() -> None:
        strategy.total(strategy.terms(first, second, data)).backward()

    return run


def pairs(folder: Path, visits: int) -> Callable[[], None]:
    """From a table of five visits a subject to one epoch's order of pairs."""
    path = folder / f"{visits}.csv"
    write_csv(path, visits // 5, visits)

    def run() -> None:
        source = CsvOnly(path, pairs="any")
        source.setup()
        list(source.train_dataloader().sampler)

    return run


def series(folder: Path) -> dict[str, dict[int, Callable[[], None]]]:
    """Quantity → size → what is timed."""
    return {
        "voxels of a view": {side**3: step(side, 2) for side in (32, 48, 64)},
        "batch": {count: step(32, count) for count in (1, 2, 4, 8)},
        "taps": {count: terms(TAPS[:count], 256) for count in (1, 2, 4, 7)},
        "points": {count: terms(FEW, count) for count in (64, 128, 256, 512, 1024)},
        "subjects": {count // 5: pairs(folder, count) for count in (5_000, 20_000, 80_000)},
    }


def main(repeats: int = 3) -> None:
    """Interleaves the sizes of a quantity; prints the slope of a line through all."""
    torch.set_num_threads(1)
    print(f"{'':<18}{'slope':>7}{'of the last two':>17}   processor ms")
    with tempfile.TemporaryDirectory() as folder:
        for name, sizes in series(Path(folder)).items():
            best = dict.fromkeys(sizes, np.inf)
            for _ in range(repeats + 1):
                for size, run in sizes.items():
                    start = time.process_time()
                    run()
                    best[size] = min(best[size], time.process_time() - start)
            x, y = np.log(list(best)), np.log(list(best.values()))
            told = ", ".join(f"{size}: {1000 * value:.1f}" for size, value in best.items())
            last = (y[-1] - y[-2]) / (x[-1] - x[-2])
            print(f"{name:<18}{np.polyfit(x, y, 1)[0]:>7.2f}{last:>17.2f}   {told}", flush=True)


if __name__ == "__main__":
    main(*[int(argument) for argument in sys.argv[1:]])
