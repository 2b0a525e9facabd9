"""A run that is asked to stop saves, says how to go on and exits with the signal's status; time saves, too."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import shutil
import signal
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import TINY_NET, fit
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from lssl.callbacks import AutoSave, autosave
from lssl.cli.main import main
from lssl.utils.errors import InputError
from lssl.utils.stop import StopSignals


def run(tmp_path, *options, **signalled):
    sender = {"class_path": "helpers.SignalAt", "init_args": signalled}
    callbacks = [f"--trainer.callbacks={json.dumps(sender)}"] if signalled else []
    return fit(tmp_path, "demo.yaml", options=["--trainer.max_steps=4", *callbacks, *options], backbone=TINY_NET)


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


def test_sigterm_saves_after_the_step_and_says_how_to_go_on(tmp_path, caplog):
    caplog.set_level("INFO")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, number=signal.SIGTERM, step=3)
    assert stop.value.code == 143
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert step_of(last) == 3
    assert signal.getsignal(signal.SIGTERM) == before
    assert not list((tmp_path / "run").glob(".*"))
    _, found, command = caplog.text.partition("Go on with: lssl ")
    assert found
    options = ["--trainer.callbacks=null", "--trainer.enable_progress_bar=false"]
    main([*shlex.split(command.splitlines()[0]), *options])
    assert step_of(last) == 4
    assert not (tmp_path / "run-2").exists()


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.randn(64, 32), batch_size=8)

    val_dataloader = train_dataloader


def train(
    folder: Path,
    *callbacks: L.Callback,
    max_lost: float | None = None,
    data: L.LightningDataModule | None = None,
    signals: StopSignals | None = None,
    **options: object,
) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    saver = AutoSave(folder, max_lost, signals)
    trainer = L.Trainer(
        max_epochs=2, callbacks=[*callbacks, saver], default_root_dir=folder, **{**quiet, "devices": 1, **options}
    )
    trainer.fit(BoringModel(), data or Data())
    return trainer


@pytest.mark.parametrize(
    ("number", "validation", "status", "step"),
    [
        (signal.SIGINT, False, 130, 3),
        (signal.SIGUSR1, False, 128 + signal.SIGUSR1, 3),
        (signal.SIGTERM, True, 143, 8),
        (signal.SIGINT, True, 130, 8),
    ],
)
def test_every_signal_within_a_step_and_within_a_validation(tmp_path, number, validation, status, step):
    from helpers import SignalAt

    with pytest.raises(SystemExit) as stop:
        train(tmp_path, SignalAt(number, step, validation))
    assert stop.value.code == status
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == step


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path):
    from helpers import SignalAt

    def twice() -> None:
        train(tmp_path, SignalAt(signal.SIGINT, 3, times=2))

    process = multiprocessing.get_context("fork").Process(target=twice)
    process.start()
    for _ in range(400):  # join would wait for the workers, too
        if process.exitcode is not None:
            break
        time.sleep(0.1)
    assert process.exitcode == 130
    assert not (tmp_path / "checkpoints").exists()


def test_before_training_a_signal_stops_at_once(tmp_path):
    class Early(L.Callback):
        def on_sanity_check_start(self, *_):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stop, StopSignals():
        train(tmp_path, Early())
    assert stop.value.code == 143
    assert not (tmp_path / "checkpoints").exists()


class Workerless(torch.utils.data.Dataset):
    """A worker dies with the group that SIGTERM was sent to, while the run waits for its batch."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if index == 24:
            lose_a_worker()
        return torch.ones(32)


def lose_a_worker() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")


def test_a_worker_that_dies_of_the_same_signal_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Data, "train_dataloader", lambda _: DataLoader(Workerless(), batch_size=8))
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, limit_val_batches=0)
    assert stop.value.code == 143
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 3


def test_what_is_half_done_is_not_saved(tmp_path):
    class Within(L.Callback):
        def on_after_backward(self, trainer, *_):
            lose_a_worker()

    with pytest.raises(RuntimeError, match="killed by signal"):
        train(tmp_path, Within())
    assert not (tmp_path / "checkpoints").exists()


def test_time_saves(tmp_path):
    class Count(L.Callback):
        steps: list[int]

        def on_save_checkpoint(self, trainer, *_):
            self.steps.append(trainer.global_step)

    count = Count()
    count.steps = []
    train(tmp_path, count, max_lost=1e-9)
    assert count.steps == list(range(1, 17))
    count.steps = []
    train(tmp_path, count, max_lost=60)
    assert count.steps == []
    with pytest.raises(InputError, match="max_lost"):
        AutoSave(tmp_path, 0)


def test_slurm_requeues_between_two_steps_and_the_run_goes_on(tmp_path, monkeypatch):
    from helpers import SignalAt

    for name, value in {"JOB_ID": "7", "NTASKS": "1", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NODEID", "0")
    asked = tmp_path / "asked"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ > {asked}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    trainer = train(tmp_path, SignalAt(signal.SIGUSR1, 3), plugins=[SLURMEnvironment()])
    assert trainer.global_step == 16
    assert asked.read_text() == "requeue 7\n"
    assert step_of(tmp_path / "hpc_ckpt_1.ckpt") == 3


class OnRank(L.Callback):
    """A signal reaches one of two processes."""

    def __init__(self, rank: int, number: int | None) -> None:
        self.rank, self.number = rank, number

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_rank == self.rank and trainer.global_step == 3 and self.number is not None:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_stop_at_the_same_step_whichever_is_asked(tmp_path, rank):
    with pytest.raises((SystemExit, Exception)):  # the launcher reports the status of its processes in its own way
        train(tmp_path, OnRank(rank, signal.SIGTERM), strategy="ddp_fork", devices=2)
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 5


def test_two_processes_save_by_time(tmp_path):
    train(tmp_path, max_lost=1e-9, strategy="ddp_fork", devices=2)
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 8


class Hangs(torch.utils.data.Dataset):
    """A batch never comes; meanwhile the run is asked to stop."""

    def __init__(self, run: int, signals: int) -> None:
        self.run, self.signals = run, signals

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if index == 24:
            time.sleep(1.0)  # the steps before are done, and the run waits
            for _ in range(self.signals):
                os.kill(self.run, signal.SIGINT)
                time.sleep(0.3)
            time.sleep(45)
        return torch.ones(32)


@pytest.mark.parametrize(("workers", "signals", "saved"), [(0, 1, True), (1, 1, True), (1, 2, False)])
def test_a_batch_that_never_comes_is_not_waited_for(tmp_path, workers, signals, saved):
    def hang() -> None:
        data = L.LightningDataModule()
        data.train_dataloader = lambda: DataLoader(Hangs(os.getpid(), signals), batch_size=8, num_workers=workers)
        train(tmp_path, data=data, limit_val_batches=0)

    process = multiprocessing.get_context("fork").Process(target=hang)
    process.start()
    for _ in range(400):  # join would wait for the workers, too
        if process.exitcode is not None:
            break
        time.sleep(0.1)
    assert process.exitcode == 130
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert step_of(last) == 3 if saved else not last.exists()


class Removes(L.Callback):
    """Somebody deletes the run folder during training."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 2:
            shutil.rmtree(trainer.default_root_dir)


def test_a_deleted_run_folder_ends_the_run_in_a_sentence_and_what_was_learned_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(autosave, "LOOK", 0.0)
    removes = json.dumps({"class_path": "test_autosave.Removes"})
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, f"--trainer.callbacks={removes}", "--trainer.check_val_every_n_epoch=9")
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lssl: error:")]
    assert len(errors) == 1
    assert "was deleted or moved" in errors[0]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert step_of(last) == 3
    run(tmp_path, f"--ckpt_path={last}", "--trainer.callbacks=null")
    assert step_of(last) == 4


def test_saving_by_time_waits_for_the_end_of_an_accumulated_step(tmp_path):
    batches = []

    class Count(L.Callback):
        def on_save_checkpoint(self, trainer, *_):
            batches.append(trainer.fit_loop.epoch_loop.batch_progress.current.processed)

    train(tmp_path, Count(), max_lost=1e-9, accumulate_grad_batches=3, limit_val_batches=0)
    assert batches == [3, 6, 8] * 2


def test_a_long_end_is_not_cut_short(tmp_path):
    """Lightning restores the handlers of all signals; an alarm that still ran would then kill the process."""

    class SlowLogger(L.pytorch.loggers.CSVLogger):
        def finalize(self, status):
            time.sleep(1.5)

    def stopped() -> None:
        from helpers import SignalAt

        with StopSignals() as signals:
            try:
                train(tmp_path, SignalAt(signal.SIGTERM, 3), signals=signals, logger=SlowLogger(tmp_path))
            finally:
                time.sleep(1.5)

    process = multiprocessing.get_context("fork").Process(target=stopped)
    process.start()
    process.join(60)
    assert process.exitcode == 143
