"""A network, a source of visits and tasks small enough for many runs a second."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lssl import Backbone, PairBatch, PairDataModule, Segmenter, Strategy, Task, View, ViewSampler, Visit
from lssl.strategies.global_contrastive import GlobalContrastive, MoCo

SIZE = 16


class Noise(PairDataModule):
    """Subjects with two visits of noise and two structures.

    Args:
        subjects: their number.
        spoil: row of the table → what happens to its image.
        **options: those of PairDataModule.
    """

    def __init__(self, subjects: int = 6, spoil: dict[int, Any] | None = None, **options: Any) -> None:
        super().__init__(**{"batch_size": 2, "split": (0.67, 0.33, 0.0), **options})
        self.subjects_in_all, self.spoil = subjects, spoil or {}

    def visit_table(self) -> pd.DataFrame:
        rows = [(f"sub-{s}", f"ses-{v}", 40.0 + v, float(v)) for s in range(self.subjects_in_all) for v in range(2)]
        return pd.DataFrame(rows, columns=["subject", "session", "age", "time"])

    def read(self, row: int) -> Visit:
        draw = torch.Generator().manual_seed(row)
        image = torch.rand(1, SIZE, SIZE, SIZE, generator=draw)
        if row in self.spoil:
            image = self.spoil[row](image)
        label = torch.zeros(SIZE, SIZE, SIZE, dtype=torch.int16)
        label[:, :8], label[:, 8:12] = 1, 2
        return Visit(
            image, torch.eye(4, dtype=torch.float64), torch.ones(SIZE, SIZE, SIZE, dtype=torch.bool), label=label
        )


def one_nan(image: Tensor) -> Tensor:
    """One voxel in the middle is NaN."""
    image = image.clone()
    image[0, 8, 8, 8] = torch.nan
    return image


def network() -> Backbone:
    """With batch norm, whose running statistics a bad batch would spoil for ever."""
    layers = [nn.Conv3d(1, 4, 2, stride=2), nn.BatchNorm3d(4), nn.ReLU(), nn.ConvTranspose3d(4, 4, 2, stride=2)]
    return Backbone(nn.Sequential(*layers), {"a": "2"})


def strategy(**options: Any) -> Task:
    """MoCo: a teacher and a queue are state beside the weights."""
    torch.manual_seed(0)
    heads = partial(MoCo, queue=4, hidden=8, projection=8)
    return GlobalContrastive(network(), ["a"], heads, views=ViewSampler(8, overlap=0.5, transforms=[]), **options)


class Mean(Strategy):
    """Pulls the output's mean to one, for batches of any size."""

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        return {"mean": (self.backbone(first.image, ["a"])["a"].mean() - 1) ** 2}


def mean(**options: Any) -> Task:
    return Mean(network(), views=ViewSampler(8, overlap=0.5, transforms=[]), **options)


def segmenter(**options: Any) -> Task:
    torch.manual_seed(0)
    return Segmenter(network(), views=ViewSampler(8, transforms=[]), **options)


TASKS = {"strategy": strategy, "segmenter": segmenter}


class Plant(L.Callback):
    """Changes the training batches of some steps.

    Args:
        change: image → image, of the second visit of the first pair, or of all with ``everywhere``.
        steps: from 1 on.
        everywhere: change all visits.
    """

    def __init__(self, change: Any, *steps: int, everywhere: bool = False, rank: int | None = None) -> None:
        self.change, self.steps, self.everywhere, self.rank = change, steps, everywhere, rank

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step + 1 not in self.steps or self.rank not in (None, trainer.global_rank):
            return
        for part in batch.values() if isinstance(batch, dict) else [batch]:
            if self.everywhere:
                part.images = self.change(part.images)
            else:
                part.images = part.images.clone()
                part.images[0, 1] = self.change(part.images[0, 1])


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """With checkpoints as the command line sets them."""
    common: dict[str, Any] = {"dirpath": folder / "checkpoints", "enable_version_counter": False}
    best = ModelCheckpoint(filename="best", monitor="val/loss", **common)
    last = ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **common)
    options = {"max_steps": 8, "log_every_n_steps": 4, "num_sanity_val_steps": 0, **options}
    return L.Trainer(
        default_root_dir=folder,
        callbacks=[*callbacks, best, last],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def broken(content: Any) -> bool:
    """Whether any tensor within is not finite."""
    if isinstance(content, Tensor):
        return content.is_floating_point() and not bool(content.isfinite().all())
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return any(broken(part) for part in parts)


def saved(folder, name="last"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=False)


def finite(checkpoint):
    return not broken(checkpoint["state_dict"]) and not broken(checkpoint["optimizer_states"])


def scaled(scale: float, growth: int = 2000) -> MixedPrecision:
    """Mixed float16 on a CPU; by itself, Lightning would take bfloat16."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth))


def mixed(precision: str) -> dict[str, Any]:
    """Options of the trainer for a precision."""
    return {"precision": precision} if precision != "16-mixed" else {"plugins": scaled(128.0)}
