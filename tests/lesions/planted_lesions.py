"""A cohort of small round heads with dark spots, some in both visits, some in the later one alone; all look alike.

The visits have grids of their own, which lie between each other's voxels, and their own brightness and noise.
"""

from __future__ import annotations

from functools import partial

import lightning as L
import numpy as np
import pandas as pd
import torch
from monai.networks.nets import DynUNet
from torch import nn

from lssl import Backbone, ChangeSegmenter, PairDataModule, ViewSampler, Visit
from lssl.data.few_shot import FewShot

SIDE, STABLE, RADIUS = 22, 3, 8.0
NEW, KNOWN = 1, 2  # label values


class Cohort(PairDataModule):
    """Subjects of two visits; every fourth has nothing new, the others one or two new spots."""

    def __init__(self, subjects: int = 40, twice: bool = False, **options):
        few = FewShot(batch_size=8, steps=options.pop("steps", 300))
        super().__init__(**{"split": (0.6, 0.0, 0.4), "few_shot": few, **options})
        self.count, self.twice = subjects, twice

    def visit_table(self):
        rows = [
            (f"s{n:03d}", f"v{visit}", 60.0 + visit, float(visit), n) for n in range(self.count) for visit in (0, 1)
        ]
        return pd.DataFrame(rows, columns=["subject", "session", "age", "time", "number"])

    def has_label(self):
        return (self.table["time"] > 0).to_numpy()

    def spots(self, number: int):
        """Centres (mm), radii, and how many of them are new, the last ones."""
        draw, centres = np.random.default_rng(number), []
        while len(centres) < STABLE + 2:
            centre = draw.uniform(-5, 5, 3)
            if np.linalg.norm(centre) < 5.5 and all(np.linalg.norm(centre - other) > 5 for other in centres):
                centres.append(centre)
        new = 0 if number % 4 == 3 else 1 + number % 2
        return centres[: STABLE + new], draw.uniform(1.5, 2.0, STABLE + new), new

    def read(self, row):
        number, later = int(self.table["number"].iloc[row]), bool(self.table["time"].iloc[row])
        draw = np.random.default_rng([number, int(later)])
        affine = np.eye(4)
        affine[:3, 3] = draw.uniform(-1.5, 1.5, 3) - (SIDE - 1) / 2
        index = np.stack(np.meshgrid(*[np.arange(SIDE)] * 3, indexing="ij"), -1)
        places = index + affine[:3, 3]
        centres, radii, new = self.spots(number)
        head = np.clip(0.5 + RADIUS - np.linalg.norm(places, axis=-1), 0, 1)
        image, label = head.copy(), np.zeros((SIDE,) * 3, np.int16)
        for place, (centre, radius) in enumerate(zip(centres, radii, strict=True)):
            fresh = place >= len(centres) - new
            distance = np.linalg.norm(places - centre, axis=-1) - radius
            if later or not fresh:
                image -= 0.5 * np.clip(0.5 - distance, 0, 1)
                label[distance < 0] = NEW if fresh else KNOWN
        image = image * draw.uniform(0.85, 1.15) + 0.05 * draw.standard_normal(image.shape)
        return Visit(
            torch.from_numpy(image[None]).float(),
            torch.from_numpy(affine),
            torch.from_numpy(head > 0.5),
            label=torch.from_numpy(label) if later else None,
        )

    def read_visits(self, rows, size, seed):
        """With ``twice``, the earlier visit is withheld: the later one stands in its place."""
        return super().read_visits(rows[-1:] * len(rows) if self.twice else rows, size, seed)


def network(combine: str) -> Backbone:
    """Three layers; for ``weight``, which is about skip connections, two levels and a bottleneck."""
    if combine == "weight":
        net = DynUNet(3, 1, 16, [3] * 3, [1, 2, 2], [2] * 2, filters=[16] * 3, norm_name="batch")
        return Backbone(net, {"decoder.0": "upsamples.1"})
    channels = 2 if combine == "concatenate" else 1
    layers: list[nn.Module] = []
    for width in (channels, 16, 16):
        layers += [nn.Conv3d(width, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU()]
    return Backbone(nn.Sequential(*layers), {"decoder.0": "6"}, in_channels=channels)


def train(combine: str, twice: bool, folder, steps: int = 300) -> tuple[ChangeSegmenter, Cohort, L.Trainer]:
    """A tiny task after its training."""
    torch.manual_seed(0)
    backbone = network(combine)
    task = ChangeSegmenter(
        backbone,
        combine=combine,
        classes={"new": [NEW]},
        views=ViewSampler(16, geometry="aligned", rotation=5.0, zoom=(0.9, 1.1), transforms=[]),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
    )
    data = Cohort(twice=twice, steps=steps)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, datamodule=data)
    return task.eval(), data, trainer
