"""Cohorts that two ranks cannot share evenly: every method trains and validates, and no rank waits for the other.

Two forked gloo processes go through all methods. Seven training subjects over 2 ranks × batches of 2 leave one over,
and so do three validation subjects.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from multiprocessing import get_context
from pathlib import Path
from queue import Empty

import lightning as L
import pytest
import test_all_ranks
import torch
from test_all_ranks import TASKS
from test_exact_resume import QUIET, Noise, Noisy, task

from lssl.data.few_shot import FewShot

FORK = get_context("fork")
RANKS, STEPS, PATIENCE = 2, 5, 240  # seconds until a method counts as hanging


class Seven(Noise):
    """Seven training subjects, three of validation."""

    def visit_table(self):
        table = super().visit_table()[:20]
        return table.assign(split=["train"] * 14 + ["val"] * 6)


class Counts(L.Callback):
    """Training and validation batches of this rank, and their pairs."""

    def __init__(self) -> None:
        self.train: list[int] = []
        self.val: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.train.append(len(batch["labelled"] if isinstance(batch, dict) else batch))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.val.append(len(batch))


def ended(name: str, folder: Path) -> tuple[list[int], list[int], bool, list[float]]:
    """Trains one method; its batches, whether all figures are finite, and sums of its weights."""
    few = FewShot(subjects=3, batch_size=2, steps=3) if name == "Segmenter" else None
    counts = Counts()
    trainer = L.Trainer(
        default_root_dir=folder,
        logger=False,
        callbacks=[counts],
        max_steps=STEPS,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        devices=RANKS,
        strategy="ddp_find_unused_parameters_true",
        enable_checkpointing=False,
        **QUIET,
    )
    module = task(name)
    trainer.fit(module, datamodule=Seven(batch_size=2, few_shot=few))
    finite = all(bool(value.isfinite()) for value in trainer.callback_metrics.values())
    sums = [float(parameter.detach().double().sum()) for parameter in module.parameters()]
    return counts.train, counts.val, finite and "val/loss" in trainer.callback_metrics, sums


def one_rank(rank: int, port: int, folder: Path, queue) -> None:
    torch.set_num_threads(1)
    test_all_ranks.Network = Noisy
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    for name in TASKS:
        L.seed_everything(7, verbose=False)
        try:
            queue.put((name, rank, ended(name, folder)))
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            queue.put((name, rank, None))
            return


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """method → what each rank has found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue, folder = FORK.Queue(), tmp_path_factory.mktemp("uneven")
    processes = [FORK.Process(target=one_rank, args=(rank, port, folder, queue)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    found: dict[str, dict[int, tuple]] = {}
    try:
        for _ in range(RANKS * len(TASKS)):
            name, rank, result = queue.get(timeout=PATIENCE)
            if result is None:
                break
            found.setdefault(name, {})[rank] = result
    except Empty:
        pass
    for process in processes:
        process.kill()
        process.join()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_no_rank_waits_for_the_other(name, both):
    (train, val, finite, sums), (other_train, other_val, other_finite, other_sums) = both[name][0], both[name][1]
    assert len(train) == STEPS
    assert train == other_train  # equally many pairs, or gathering them would fail
    assert len(val) == len(other_val)  # batches
    assert sum(val)
    assert finite
    assert other_finite
    assert sums == other_sums
