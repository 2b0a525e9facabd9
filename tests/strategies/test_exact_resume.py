"""A run resumed from any checkpoint is the uninterrupted one to the bit: weights, teacher, queue, optimizer, log.

An uninterrupted run writes checkpoints. Each is resumed in a folder that holds the whole log of that run, as if the run
had been killed at its last step.
"""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pandas as pd
import pytest
import test_all_ranks
import torch
from helpers import few
from lightning.pytorch.callbacks import ModelCheckpoint
from test_all_ranks import TASKS
from torch import nn

from lssl.data.batch import Visit
from lssl.data.datamodule import PairDataModule
from lssl.data.few_shot import FewShot
from lssl.resume import ExactResume
from lssl.runs.loggers import RunCSVLogger
from lssl.segmentation.segmenter import Segmenter

SIZE = 20
#: What keeps more than weights and moments: a queue, centres, a teacher, an order of labelled visits.
STATEFUL = ("GlobalContrastive MoCo", "AnatomicalInvariance", "PriorGuidedLocal", "Segmenter")
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Noisy(test_all_ranks.Network):
    """Draws from torch's global generator, and keeps running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder.append(nn.Dropout(0.2))
        self.deep[1] = nn.BatchNorm3d(6)


@pytest.fixture(autouse=True)
def _noisy(monkeypatch):
    monkeypatch.setattr(test_all_ranks, "Network", Noisy)


class Noise(PairDataModule):
    """Nine training subjects of two visits; labels are thresholds of the image. ``reads`` lists pairs."""

    reads: ClassVar[list[tuple[int, int]]] = []

    def visit_table(self) -> pd.DataFrame:
        rows = [(f"p{n:02}", f"m{v}", 40.0 + n + v, float(v)) for n in range(11) for v in range(2)]
        table = pd.DataFrame(rows, columns=["subject", "session", "age", "time"])
        return table.assign(split=["train"] * 18 + ["val"] * 4)

    def read_visits(self, rows, size, seed):
        self.reads.append(tuple(rows))
        return super().read_visits(rows, size, seed)

    def read(self, row: int) -> Visit:
        image = torch.rand(1, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(row))
        affine = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64))
        return Visit(image, affine, image[0] > 0.1, label=(4 * image[0]).short())


class Draws(L.Callback):
    """Uses numpy's and Python's generators, as a callback of a user may."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        weight = next(p for p in pl_module.parameters() if p.requires_grad)
        weight.data.add_(1e-3 * (np.random.rand() + random.random()))


class Saves(ModelCheckpoint):
    """Saves in hooks of training and validation; a ModelCheckpoint comes after all other callbacks."""

    HOOKS = ("train_start", "train_epoch_start", "train_batch_start", "train_batch_end", "validation_start")
    HOOKS += ("validation_batch_end", "validation_end", "train_epoch_end", "train_end")

    def __init__(self, folder: Path, hooks: tuple[str, ...] = HOOKS, steps: range = range(100)) -> None:
        super().__init__(dirpath=folder, save_top_k=0)
        self.steps, number = steps, itertools.count()

        def save(hook: str, trainer: L.Trainer) -> None:
            if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.global_step in steps:
                trainer.save_checkpoint(folder / f"{next(number):03}_{hook}_step{trainer.global_step}.ckpt")

        for hook in self.HOOKS:
            wanted = hook in hooks
            setattr(self, f"on_{hook}", lambda trainer, *_, hook=hook, wanted=wanted: wanted and save(hook, trainer))


class End(L.Callback):
    """Saves at the end, in every process."""

    def on_train_end(self, trainer, pl_module):
        assert sum(isinstance(callback, ExactResume) for callback in trainer.callbacks) == 1
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "end.ckpt")


class Stops(L.Callback):
    """Ends a run after a batch, as a time limit would."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop |= trainer.fit_loop.total_batch_idx + 1 == self.batches


def task(name: str) -> L.LightningModule:
    torch.manual_seed(1)
    return (
        Segmenter(loss_weights={"consistency": 1.0}, **test_all_ranks.common())
        if name == "Segmenter"
        else TASKS[name]()
    )


def train(
    name: str, folder: Path, *callbacks: L.Callback, checkpoint: Path | None = None, workers: int = 0, **settings
):
    """Trains with a plain Trainer, and returns everything that must be equal."""
    L.seed_everything(7 if checkpoint is None else 8, verbose=False)  # a resumed run has the seed of its checkpoint
    few = FewShot(subjects=3, batch_size=2, steps=3) if name == "Segmenter" else None
    data = Noise(batch_size=2, num_workers=workers, few_shot=few)
    logger = RunCSVLogger(folder, name="", version="")
    settings = {"max_steps": 9, "log_every_n_steps": 2, **QUIET, **settings}
    trainer = L.Trainer(default_root_dir=folder, logger=logger, callbacks=[Draws(), End(), *callbacks], **settings)
    module = task(name)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    if not (folder / "end.ckpt").exists():  # a run that was complete
        trainer.save_checkpoint(folder / "end.ckpt")
    return ended(folder)


def ended(folder: Path) -> dict[str, Any]:
    """Everything that must be equal at the end of a run."""
    end = torch.load(folder / "end.ckpt", weights_only=True)  # plain types alone
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "exact_resume", "since_log", "global_step")
    del end["exact_resume"]["open"]  # differs if a complete run is resumed and has nothing to do
    loops = {name: end["loops"]["fit_loop"][name] for name in ("epoch_progress", "epoch_loop.batch_progress")}
    return {name: end[name] for name in kept} | loops


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Where two nested contents differ."""
    if isinstance(first, dict):
        keys = [f"{path}: {key}" for key in first.keys() ^ second.keys()]
        return keys + [
            line
            for key in first.keys() & second.keys()
            for line in differences(first[key], second[key], f"{path}/{key}")
        ]
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return [f"{path}: {len(first)} and {len(second)}"]
        return [
            line
            for i, (a, b) in enumerate(zip(first, second, strict=True))
            for line in differences(a, b, f"{path}/{i}")
        ]
    equal = torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
    return [] if equal else [f"{path}: {str(first)[:60]} is not {str(second)[:60]}"]


def check(name: str, folder: Path, saves: tuple[str, ...] = Saves.HOOKS, steps: range = range(100), **settings) -> int:
    """Resumes every checkpoint of a run; returns their number."""
    whole = train(name, folder / "whole", Saves(folder / "cuts", saves, steps), **settings)
    log = (folder / "whole" / "metrics.csv").read_text()
    assert log.count("\n") > 3
    cuts = sorted((folder / "cuts").glob("*.ckpt"))
    for cut in cuts:
        here = folder / cut.stem
        here.mkdir()
        shutil.copy(folder / "whole" / "metrics.csv", here)
        resumed = train(name, here, checkpoint=cut, **settings)
        assert not differences(whole, resumed), cut.name
        assert (here / "metrics.csv").read_text() == log, cut.name
    return len(cuts)


@pytest.mark.parametrize("name", few(sorted(TASKS, key=lambda name: name not in STATEFUL), len(STATEFUL)))
def test_every_method_resumes_exactly_within_an_epoch(name, tmp_path):
    """After batch 6 of 9. An epoch has 4 batches, of which the Segmenter has only 3 with new labelled visits."""
    assert check(name, tmp_path, ("train_batch_end",), range(6, 7)) == 1


SETTINGS = {
    "steps": {},
    "epochs, accumulated": {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 2},
    "epochs, accumulated over 3 of 4": {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 3},
    "validation within epochs": {"max_steps": -1, "max_epochs": 2, "val_check_interval": 0.5},
    "validation by steps": {
        "max_steps": 6,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "accumulate_grad_batches": 2,
    },
    "rare validation": {"max_steps": 9, "check_val_every_n_epoch": 2},
    "no validation": {"max_steps": 9, "limit_val_batches": 0},
    "cut epochs": {"max_steps": 7, "limit_train_batches": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["GlobalContrastive MoCo", "Segmenter"])
def test_every_hook_of_a_run_writes_an_exact_checkpoint(name, settings, tmp_path):
    assert check(name, tmp_path, **SETTINGS[settings]) > 15


@pytest.mark.parametrize("settings", few(["epochs, accumulated", "steps"], 1))
def test_checkpoints_around_an_epochs_end_are_exact(settings, tmp_path):
    """In particular a validation that is due is made, and one that is done is not made again."""
    steps = range(4, 5) if settings == "steps" else range(2, 3)
    assert check("GlobalContrastive BYOL", tmp_path, steps=steps, **SETTINGS[settings]) >= 7


@pytest.mark.parametrize(
    "batches", [pytest.param(3, marks=pytest.mark.slow), 4, pytest.param(5, marks=pytest.mark.slow), 6]
)
@pytest.mark.parametrize("limit", [{}, {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 2}])
def test_a_run_that_was_stopped_leaves_no_trace(batches, limit, tmp_path):
    """A stop validates and logs once more, and Lightning counts the epoch as done."""
    name = "GlobalContrastive MoCo"
    whole = train(name, tmp_path / "whole", enable_checkpointing=False, **limit)
    saves = Saves(tmp_path / "cuts", ("train_epoch_end", "train_end"))
    train(name, tmp_path / "run", Stops(batches), saves, **limit)
    for cut in sorted((tmp_path / "cuts").glob("*.ckpt"))[-2:]:
        resumed = train(name, tmp_path / "run", checkpoint=cut, enable_checkpointing=False, **limit)
        assert not differences(whole, resumed), cut.name
        assert (tmp_path / "run" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


@pytest.mark.parametrize("name", few(["Segmenter", "GlobalContrastive MoCo"], 1))
def test_workers_change_nothing(name, tmp_path):
    """A run without workers, one of two workers, and this one resumed from within an epoch and from its end."""
    whole = train(name, tmp_path / "whole", enable_checkpointing=False)
    saves = Saves(tmp_path / "cuts", ("train_batch_end", "train_epoch_end"), range(4, 6))
    assert not differences(whole, train(name, tmp_path / "run", saves, workers=2))
    cuts = list((tmp_path / "cuts").glob("*.ckpt"))
    assert len(cuts) == 3
    for cut in cuts:
        resumed = train(name, tmp_path / cut.stem, checkpoint=cut, workers=2, enable_checkpointing=False)
        assert not differences(whole, resumed), cut.name


def test_samples_that_were_used_are_not_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr("lssl.data.loaders.reading_rate", lambda *_: None)  # it reads a pair or two beforehand
    Noise.reads.clear()
    train(
        "MaskedAutoencoder", tmp_path, Saves(tmp_path / "cuts", ("train_batch_end",), range(6, 7)), limit_val_batches=0
    )
    whole = list(Noise.reads)
    Noise.reads.clear()
    (cut,) = (tmp_path / "cuts").glob("*.ckpt")
    train("MaskedAutoencoder", tmp_path, checkpoint=cut, limit_val_batches=0, enable_checkpointing=False)
    assert len(whole) == 9 * 2
    assert Noise.reads == whole[-3 * 2 :]
