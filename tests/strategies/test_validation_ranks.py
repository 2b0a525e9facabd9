"""Figures of an evaluation on two ranks are those on one, whatever the number of pairs: none is counted twice."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
from test_exact_resume import QUIET, Noise, task

from lssl.data.whole_batches import WholeBatches


class Odd(Noise):
    """Six training subjects, five of validation, five of test."""

    def visit_table(self):
        table = super().visit_table()
        parts = ["train"] * 2 + ["val"] * 10 + ["test"] * 10
        return table.assign(split=parts)


class Keep(L.Callback):
    """Writes the figures of the sanity check, when DDP has wrapped the network and nothing is trained yet."""

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking and trainer.is_global_zero:
            found = {key: float(value) for key, value in trainer.callback_metrics.items()}
            Path(trainer.default_root_dir, "found.json").write_text(json.dumps(found))


def figures(name: str, folder: Path, ranks: int, batch_size: int, fit: bool = False) -> dict[str, float]:
    module = task(name)
    L.seed_everything(7, verbose=False)
    several = {"devices": ranks, "strategy": "ddp_fork"} if ranks > 1 else {"devices": 1}
    quiet = {**QUIET, "logger": False, "enable_checkpointing": False}
    limits = {"max_steps": 1, "limit_train_batches": 1, "num_sanity_val_steps": -1}
    trainer = L.Trainer(default_root_dir=folder, callbacks=[Keep()], **limits, **several, **quiet)
    data = Odd(batch_size=batch_size)
    if fit:
        trainer.fit(module, datamodule=data)
        return json.loads((folder / "found.json").read_text())
    found = trainer.validate(module, datamodule=data, verbose=False)[0]
    return found | trainer.test(module, datamodule=data, verbose=False)[0]


@pytest.mark.parametrize(
    ("name", "batch_size", "fit"), [("GlobalContrastive SimCLR", 2, False), ("MaskedAutoencoder", 1, True)]
)
def test_two_ranks_say_what_one_says(tmp_path, name, batch_size, fit):
    """Five pairs are three batches of two, and five of one; without the fix, a pair counts twice, and others differ."""
    one, two = (figures(name, tmp_path, ranks, batch_size, fit) for ranks in (1, 2))
    assert "val/loss" in one
    assert two == pytest.approx(one, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("items", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_item_counts_once_and_ranks_have_equally_many_batches(items, world, size):
    counted, lengths = [], set()
    for rank in range(world):
        sampler = WholeBatches(range(items), size, world, rank)
        mine = list(sampler)
        assert len(mine) == len(sampler)
        batches = [mine[start : start + size] for start in range(0, len(mine), size)]
        lengths.add(len(batches))
        for number, batch in enumerate(batches):
            place, counts = sampler.place(number)
            np.testing.assert_array_equal(batch, np.arange(items)[place * size : (place + 1) * size])
            counted += batch if counts else []
    assert sorted(counted) == list(range(items))
    assert len(lengths) == 1
