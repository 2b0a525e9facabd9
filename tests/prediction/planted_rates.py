"""A cohort of small images whose groups differ in nothing but the rate at which one pattern grows.

Stripes along the first axis have a height of each subject's own, and grow by the group's yearly rate. All else (other
stripes, brightness, noise) is drawn anew for every visit.
"""

from __future__ import annotations

import math

import lightning as L
import numpy as np
import pandas as pd
import torch
from torch import nn

from lssl.data.batch import Visit
from lssl.data.datamodule import PairDataModule
from lssl.networks.backbone import Backbone
from lssl.views.sampler import ViewSampler

SIDE = 12
RATES = {"stable": 0.0, "fast": 0.15}


class Cohort(PairDataModule):
    """Subjects of two visits, 1 to 4 years apart."""

    def __init__(self, subjects: int = 120, unknown: int = 0, **options):
        super().__init__(**{"batch_size": 16, "split": (0.5, 0.1, 0.4), "targets": {"group": "visits"}, **options})
        self.count, self.unknown = subjects, unknown

    def visit_table(self):
        rows = []
        for number in range(self.count):
            draw = np.random.default_rng(number)
            years, age = draw.uniform(1, 4), draw.uniform(55, 80)
            group = None if number < self.unknown else list(RATES)[number % 2]
            for visit, time in enumerate((0.0, years)):
                rows.append((f"s{number:03d}", f"v{visit}", age + time, time, "AB"[number % 5 == 0], group, number))
        return pd.DataFrame(rows, columns=["subject", "session", "age", "time", "site", "group", "number"])

    def read(self, row):
        visit = self.table.iloc[row]
        own = np.random.default_rng(int(visit["number"])).normal(1, 0.2)
        rate = RATES.get(visit["group"], 0.0)
        draw = torch.Generator().manual_seed(row)
        wave = (torch.arange(SIDE) * math.pi / 2).cos()
        image = 0.05 * torch.randn(SIDE, SIDE, SIDE, generator=draw) + 0.3 * torch.randn(1, generator=draw)
        heights = [own + rate * visit["time"], *(1 + 0.3 * torch.randn(2, generator=draw)).tolist()]
        for axis, height in enumerate(heights):
            image = image + height * wave.view([SIDE if other == axis else 1 for other in range(3)])
        mask = torch.ones(SIDE, SIDE, SIDE, dtype=torch.bool)
        return Visit(image[None], torch.eye(4).double(), mask, age=float(visit["age"]), time=float(visit["time"]))


def backbone() -> Backbone:
    """Two strided convolutions and a raw one."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 16)):
        layers += [nn.Conv3d(before, after, 3, stride=2, padding=1), nn.BatchNorm3d(after), nn.ReLU()]
    return Backbone(nn.Sequential(*layers, nn.Conv3d(16, 16, 1)), {"bottleneck": "6"})


def views() -> ViewSampler:
    """The whole image."""
    return ViewSampler(SIDE, geometry="shared", affine_probability=0.0, flip=(0.0, 0.0, 0.0), transforms=[])


def train(task, data, folder, steps: int = 150):
    """Trains on the CPU, without checkpoints."""
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        check_val_every_n_epoch=1000,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, datamodule=data)
    return trainer
