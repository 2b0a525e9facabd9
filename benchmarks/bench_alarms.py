"""Does the monitor raise a false alarm? Five backbones, untrained and well trained.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/bench_alarms.py [steps] [backbones, by parts of their names]

Each backbone is pretrained by dense InfoNCE between visits (``longitudinal_infonce``), which keeps features apart by
negatives, on procedural heads. Every finding of :mod:`lssl.evaluation.health` counts, also one of a single measurement,
which a run would not warn of yet:

- **untrained**: the first measurement, with nothing to compare it with. There, only what a threshold says of the
  network as it is built can be found.
- **trained**: all later ones, as the monitor compares them; and shortcuts.

That the training is sound is shown beside it: retrieval of a subject's other visits and matching of corresponding
voxels before and after, at the tap that is best at the end. A planted collapse must be found, or silence says nothing:
the last measurement with ranks of 2 in place of those measured. A few minutes of one core.
"""

from __future__ import annotations

import math
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from monai.networks.nets import BasicUNet, DynUNet, SegResNet, SwinUNETR

from lssl import Backbone, ViewSampler
from lssl.callbacks import RepresentationMonitor
from lssl.datamodules.phantom import PhantomDataModule
from lssl.evaluation.health import collapses, shortcuts
from lssl.strategies.longitudinal_local import InfoNCE, LongitudinalLocal

STEPS, EVERY, SIDE = 200, 50, 32
FILTERS = (8, 8, 16, 32, 64)
OFF = {"variance": 0.0, "covariance": 0.0, "orthogonality": 0.0}
DYNUNET: dict[str, Any] = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 8,
    "kernel_size": [3] * 5,
    "strides": [1, 2, 2, 2, 2],
    "upsample_kernel_size": [2] * 4,
    "filters": FILTERS,
}
DECODER = {"decoder.2": "upsamples.1", "decoder.1": "upsamples.2", "decoder.0": "upsamples.3"}
_made: dict = {}


class Heads(PhantomDataModule):
    """Heads that are made once for all backbones."""

    def __init__(self) -> None:
        super().__init__(
            subjects=14, visits=2, size=32, spacing=6.0, interval=4.0, split=(0.5715, 0.4285, 0.0), batch_size=1
        )
        self.cache = _made


class Alarms(RepresentationMonitor):
    """Keeps every finding, where the monitor waits for a second one."""

    def __init__(self) -> None:
        super().__init__(every=EVERY)
        self.findings: list[str] = []
        self.measurements = 0

    def _warn(self, trainer: L.Trainer, step: int) -> None:
        super()._warn(trainer, step)
        self.measurements += 1
        found = {**self._suspects, **shortcuts(self.figures, step)}
        self.findings += [f"step {step}, {tap}: {text}" for tap, text in found.items()]


def backbones() -> Iterator[tuple[str, torch.nn.Module, dict[str, str]]]:
    """Name, network, taps of the decoder."""
    basic = BasicUNet(3, 1, 8, (*FILTERS, 8), act="relu", norm="batch", bias=False)
    yield "BasicUNet, batch norm", basic, {"decoder.2": "upcat_3", "decoder.1": "upcat_2", "decoder.0": "upcat_1"}
    yield "DynUNet, instance norm", DynUNet(**DYNUNET), DECODER
    yield "DynUNet, residual blocks", DynUNet(**DYNUNET, res_block=True), DECODER
    layers = {f"decoder.{2 - number}": f"up_layers.{number}" for number in range(3)}
    yield "SegResNet, group norm", SegResNet(3, 8, 1, 8), layers
    swin = SwinUNETR(1, 8, feature_size=12, norm_name=("group", {"num_groups": 4}))  # its deepest map has one voxel
    yield (
        "SwinUNETR, layer and group norm",
        swin,
        {"decoder.2": "decoder3", "decoder.1": "decoder2", "decoder.0": "decoder1"},
    )


def train(network: torch.nn.Module, taps: dict[str, str], steps: int, folder: str) -> tuple[Alarms, LongitudinalLocal]:
    """One run with its monitor."""
    L.seed_everything(0)
    task = LongitudinalLocal(
        Backbone(network, taps, in_channels=1),
        objective=InfoNCE,
        encoder_taps=[],
        decoder_taps=list(taps),
        samples=256,
        projector_layers=2,
        hidden=128,
        projection=64,
        loss_weights=OFF,
        views=ViewSampler(SIDE, geometry="independent", intensity="independent"),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01),
    )
    monitor = Alarms()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[monitor],
        logger=False,
        gradient_clip_val=5.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(task, datamodule=Heads())
    return monitor, task


def planted(monitor: Alarms, channels: dict[str, int]) -> int:
    """Taps at which features of rank 2 are found, everything else as measured."""
    ill = {name: 2.0 if name.startswith("rank/") else value for name, value in monitor.figures.items()}
    return len(collapses(ill, monitor.first, monitor.best, channels))


def best(figures: dict[str, float], kind: str) -> str:
    """The tap with the highest figure."""
    known = {name: value for name, value in figures.items() if name.startswith(f"{kind}/") and not math.isnan(value)}
    return max(known, key=lambda name: known[name])


def rows(steps: int, wanted: list[str]) -> Iterator[str]:
    """Markdown, a row per backbone."""
    yield (
        "| backbone | taps × measurements | ↓ findings, untrained | ↓ findings, trained | ↑ planted rank 2 found | "
        "retrieval | matching | rank |\n| --- |" + " --: |" * 7
    )
    for name, network, taps in backbones():
        if wanted and not any(word in name for word in wanted):
            continue
        with tempfile.TemporaryDirectory() as folder:
            monitor, task = train(network, taps, steps, folder)
        channels = {tap: task.backbone.taps[tap].channels for tap in taps}
        untrained = collapses(monitor.first, {}, None, channels)
        ones = [best(monitor.figures, kind) for kind in ("retrieval", "matching", "rank")]
        shown = [f"{monitor.first[one]:.2f} → {monitor.figures[one]:.2f}" for one in ones]
        counts = [f"{len(taps)} × {monitor.measurements}", str(len(untrained)), str(len(monitor.findings))]
        counts.append(f"{planted(monitor, channels)} of {len(taps)}")
        yield f"| {name} | {' | '.join([*counts, *shown])} |"
        for text in [*(f"untrained, {tap}: {said}" for tap, said in untrained.items()), *monitor.findings]:
            yield f"  {name}, {text}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for row in rows(int(sys.argv[1]) if len(sys.argv) > 1 else STEPS, sys.argv[2:]):
        print(row, flush=True)
