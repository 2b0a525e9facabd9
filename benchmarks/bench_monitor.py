"""What the monitor costs at its default interval: its share of a run's steps, measured.

python benchmarks/bench_monitor.py [side of the views] [pairs of a batch] [steps]

Runs the recommended presets on procedural heads and prints seconds of a step and of a measurement, and the share of
the training time that one measurement every so many steps comes to.
"""

from __future__ import annotations

import sys
import time
from functools import partial

import torch

from lssl import Backbone, Strategy, ViewSampler
from lssl.callbacks import RepresentationMonitor
from lssl.datamodules.phantom import PhantomDataModule
from lssl.evaluation.representation import held_out_pairs, measure, trained_taps
from lssl.networks.backbone import unet
from lssl.strategies.global_contrastive import GlobalContrastive, MoCo
from lssl.strategies.longitudinal_local import InfoNCE, LongitudinalLocal
from lssl.strategies.prior_guided_local import PriorGuidedLocal

SIDE, PAIRS, STEPS = (int(argument) for argument in (*sys.argv[1:], *("48", "2", "5")[len(sys.argv) - 1 :]))
MONITOR = RepresentationMonitor()


def strategies() -> dict[str, Strategy]:
    """By name; a U-Net of half the default widths, so that one core can do it."""
    views = ViewSampler(SIDE)

    def backbone() -> Backbone:
        return Backbone(unet(features=(8, 16, 32, 64, 128, 8)), channels_last=True)

    small = {"hidden": 128, "projection": 64, "views": views}
    dense = {"encoder_taps": [], "decoder_taps": ["decoder.2", "decoder.1", "decoder.0"], "projector_layers": 2}
    off = {"variance": 0.0, "covariance": 0.0, "orthogonality": 0.0}
    return {
        "LongitudinalLocal, info_nce": LongitudinalLocal(
            backbone(), objective=InfoNCE, loss_weights=off, **dense, **small
        ),
        "PriorGuidedLocal": PriorGuidedLocal(backbone(), min_points=4, **small),
        "GlobalContrastive, MoCo": GlobalContrastive(backbone(), objective=partial(MoCo, hidden=512), views=views),
    }


def seconds_of_a_step(strategy: Strategy, data: PhantomDataModule) -> float:
    """Median over steps: views, forward, backward, update; reading left out."""
    optimizer = torch.optim.AdamW([parameter for parameter in strategy.parameters() if parameter.requires_grad])
    batches, times = list(data.train_dataloader()), []
    for step in range(STEPS):
        start = time.perf_counter()
        batch = batches[step % len(batches)]
        strategy.generator.manual_seed(step)
        terms = strategy.losses(batch)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return sorted(times)[STEPS // 2]


def main() -> None:
    """Prints a line for each method."""
    data = PhantomDataModule(
        subjects=16, visits=3, size=SIDE + 8, spacing=190 / (SIDE + 8), split=(0.5, 0.5, 0.0), batch_size=PAIRS
    )
    data.setup("fit")
    print(
        f"{PAIRS} pairs of {SIDE}³ views; {MONITOR.subjects} subjects of {MONITOR.visits} visits, "
        f"every {MONITOR.every} steps"
    )
    for name, strategy in strategies().items():
        strategy.train()
        held_out = list(held_out_pairs(strategy, data.val_dataloader(), MONITOR.subjects, MONITOR.visits))
        taps = trained_taps(strategy)
        step, start = seconds_of_a_step(strategy, data), time.perf_counter()
        measure(strategy, held_out, taps)
        took = time.perf_counter() - start
        share = took / (took + MONITOR.every * step)
        print(f"{name:<30} step {step:6.2f} s, measurement {took:6.2f} s ({len(taps)} taps): {share:5.1%} of the time")


if __name__ == "__main__":
    main()
