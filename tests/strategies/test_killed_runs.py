"""Runs killed with -9 at a random moment, or while they write a checkpoint, on one and two ranks: resumed exactly."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from multiprocessing import get_context
from pathlib import Path

import lightning as L
import pytest
import test_all_ranks
import torch
from test_all_ranks import TASKS
from test_exact_resume import Noisy, differences, ended, train

from lssl.runs.checkpoint_io import AtomicCheckpointIO

FORK = get_context("fork")
HARDEST = "two ranks, accumulated, two workers"
NAMES = ("GlobalContrastive MoCo", "AnatomicalInvariance", "Segmenter")


class SavesEachBatch(L.pytorch.callbacks.Checkpoint):
    """Writes ``last.ckpt`` after every batch; kills its own process within the write after a given one."""

    def __init__(self, path: Path, kill_in: int | None = None) -> None:
        self.path, self.kill_in = path, kill_in

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx + 1 == self.kill_in:
            original = os.replace

            def replace(source, target):  # all is written but not in its place
                if Path(target) == self.path:
                    os.truncate(source, os.path.getsize(source) // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
                original(source, target)

            os.replace = replace
        trainer.save_checkpoint(self.path)


def one_rank(name: str, folder: Path, options: dict, rank: int, port: int, resume: bool, kill_in: int | None) -> None:
    torch.set_num_threads(1)
    test_all_ranks.Network = Noisy
    if options.get("devices", 1) > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    path = folder / "last.ckpt"
    saves = SavesEachBatch(path, kill_in)
    train(name, folder, saves, checkpoint=path if resume else None, plugins=[AtomicCheckpointIO()], **options)


def start(name: str, folder: Path, options: dict, resume: bool = False, kill_in: int | None = None) -> list:
    """Processes of a run, one for each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        FORK.Process(target=one_rank, args=(name, folder, options, rank, port, resume, kill_in))
        for rank in range(options.get("devices", 1))
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list) -> list[int]:
    for process in processes:
        process.join(240)
    return [process.exitcode for process in processes]


RUNS = {
    "one rank": {},
    "two workers": {"workers": 2},
    "accumulated": {"max_steps": -1, "max_epochs": 3, "accumulate_grad_batches": 2},
    "two ranks": {"devices": 2, "strategy": "ddp", "max_steps": 6},
    HARDEST: {
        "devices": 2, "strategy": "ddp", "max_steps": 5, "accumulate_grad_batches": 2, "workers": 2
    },
}  # fmt: skip


CASES = [(name, kind, place) for name in NAMES for kind in RUNS for place in ("anywhere", "in a write")]
CASES += [(name, kind, "anywhere") for name in TASKS if name not in NAMES for kind in ("two workers", HARDEST)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "place"), CASES)
def test_a_killed_run_resumes_exactly(name, kind, place, tmp_path):
    draw, options = random.Random(f"{name} {kind} {place}"), RUNS[kind]
    (tmp_path / "cut").mkdir()
    assert set(finish(start(name, tmp_path / "whole", options))) == {0}
    if place == "in a write":
        killed = start(name, tmp_path / "cut", options, kill_in=draw.randint(2, 7))
        killed[0].join(240)
    else:
        killed = start(name, tmp_path / "cut", options)
        while not (tmp_path / "cut" / "last.ckpt").exists():
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.7))
    for process in killed:
        process.kill()
    finish(killed)
    assert set(finish(start(name, tmp_path / "cut", options, resume=True))) == {0}
    whole, resumed = ended(tmp_path / "whole"), ended(tmp_path / "cut")
    assert not differences(whole, resumed)
    logs = [(tmp_path / run / "metrics.csv").read_text() for run in ("whole", "cut")]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_spawned_ranks_see_what_launched_ranks_see(tmp_path):
    """ddp_spawn sends task and data to new processes; nine subjects do not divide by two ranks of two."""
    launched, spawned = ({"devices": 2, "strategy": strategy, "max_steps": 6} for strategy in ("ddp", "ddp_spawn"))
    name, sharing = "GlobalContrastive MoCo", torch.multiprocessing.get_sharing_strategy()
    test_all_ranks.Network, original = Noisy, test_all_ranks.Network
    assert set(finish(start(name, tmp_path / "launched", launched))) == {0}
    torch.multiprocessing.set_sharing_strategy("file_system")  # the other one needs more of /dev/shm than some have
    try:
        train(name, tmp_path / "spawned", enable_checkpointing=False, **spawned)
    finally:
        torch.multiprocessing.set_sharing_strategy(sharing)
        test_all_ranks.Network = original
    assert not differences(ended(tmp_path / "launched"), ended(tmp_path / "spawned"))
