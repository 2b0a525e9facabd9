"""Trained with T1 and FLAIR, tested with either alone: what ``views.contrasts`` is worth in fine-tuning.

Segmenters learn from label maps with both contrasts, once with all views showing both (``same``) and once with a random
choice (``mix``), from the same crops and initial weights. Held-out visits, of other maps, are segmented from both, from
T1 and from FLAIR; the score is the mean Dice of the structures.

    .venv/bin/python benchmarks/bench_contrasts.py MAPS --steps 300
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import lightning as L
import torch
from monai.networks.nets import BasicUNet

from lssl import Backbone, Segmenter, ViewSampler
from lssl.data.few_shot import FewShot
from lssl.datamodules import LabelMapDataModule
from lssl.segmentation.scores import dice_scores

SHOWN = {"both": (1.0, 1.0), "T1": (1.0, 0.0), "FLAIR": (0.0, 1.0)}


def task(contrasts: str, size: int, rate: float) -> Segmenter:
    """A small U-Net of two channels."""
    torch.manual_seed(0)
    network = BasicUNet(3, 2, 16, (16, 16, 32, 32, 64, 16), act="relu", norm=("instance", {"affine": True}))
    taps = {"bottleneck": "down_4.convs.conv_0.conv"}
    views = ViewSampler(size, same_visit=1.0, contrasts=contrasts)
    optimizer = partial(torch.optim.AdamW, lr=rate)
    return Segmenter(Backbone(network, taps, in_channels=2), views=views, optimizer=optimizer)


@torch.no_grad()
def scores(segmenter: Segmenter, data: LabelMapDataModule) -> dict[str, float]:
    """Mean Dice of the structures, and over the held-out visits, by what they show."""
    rows = data.table.index[data.table["split"] == "val"]
    found: dict[str, list[float]] = {name: [] for name in SHOWN}
    for row in rows:
        visit = data.read(int(row))
        truth = segmenter.to_class_index(visit.label)
        for name, shown in SHOWN.items():
            image = visit.image * torch.tensor(shown)[:, None, None, None]
            dice = dice_scores(segmenter.segment(image, visit.affine), truth, segmenter.known_classes().number)[1:]
            found[name].append(float(dice.nanmean()))
    return {name: sum(values) / len(values) for name, values in found.items()}


def main() -> None:
    """Prints a line per way of training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("maps")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--subjects", type=int, default=None)
    parser.add_argument("--rate", type=float, default=3e-3)
    chosen = parser.parse_args()
    options = {"contrasts": ("T1", "FLAIR"), "visits": 1, "size": (56, 72, 64), "spacing": 3.0}
    few = FewShot(steps=chosen.steps, batch_size=2)
    data = LabelMapDataModule(chosen.maps, chosen.subjects, split=(0.75, 0.25, 0.0), few_shot=few, **options)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    for contrasts in ("same", "mix"):
        segmenter, start = task(contrasts, 32, chosen.rate), time.monotonic()
        L.seed_everything(0)
        L.Trainer(max_steps=chosen.steps, accelerator="cpu", limit_val_batches=0, **quiet).fit(segmenter, data)
        found = scores(segmenter.eval(), data)
        print(
            contrasts,
            {name: round(value, 3) for name, value in found.items()},
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
