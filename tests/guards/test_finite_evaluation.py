"""Validation, test and prediction refuse what is not finite, before a checkpoint is chosen by it."""

from __future__ import annotations

import pytest
import torch
from small import TASKS, Noise, one_nan, strategy, trainer

from lssl.guards import EvaluationGuard
from lssl.guards.culprits import images_finite, named_visits, odd_visits
from lssl.utils.errors import InputError

ALL = dict.fromkeys(range(12), one_nan)


class Held(Noise):
    """Only visits of one split are spoilt, so that training itself stays finite."""

    def __init__(self, part: str, **options):
        super().__init__(**options)
        self.part = part

    def read(self, row):
        visit = super().read(row)
        if len(self.table) and self.table["split"].iat[row] == self.part:
            visit.image = one_nan(visit.image)
        return visit

    def reader(self):
        return self


@pytest.mark.parametrize("task", TASKS)
def test_validation_stops_before_best_is_written(task, tmp_path):
    """A Segmenter gives a finite Dice for an image with NaN."""
    run = trainer(tmp_path)
    data = Held("val")
    data.few_shot.steps = 2
    with pytest.raises(InputError, match=r"Validation after step 2: sub-\d ses-\d is NaN or infinite in 1 voxel"):
        run.fit(TASKS[task](), datamodule=data)
    assert not (tmp_path / "checkpoints" / "best.ckpt").exists()


def test_test_and_prediction_name_the_visit(tmp_path):
    data = Held("test", split=(0.34, 0.33, 0.33))
    with pytest.raises(InputError, match=r"Test: sub-\d ses-\d is NaN or infinite in 1 voxel"):
        trainer(tmp_path).test(strategy(), datamodule=data)
    with pytest.raises(InputError, match=r"Prediction: sub-\d ses-\d is NaN or infinite in 1 voxel"):
        trainer(tmp_path).predict(strategy(), datamodule=data)


class Diverged(EvaluationGuard):
    """Weights are lost before validation."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        next(pl_module.parameters()).data.fill_(torch.nan)


def test_a_term_that_is_not_finite_names_the_visits(tmp_path):
    made = strategy()
    made.configure_callbacks = lambda: [Diverged()]
    with pytest.raises(InputError, match=r"Validation after step 0: similarity is nan, loss is nan for sub-\d ses-\d"):
        trainer(tmp_path).validate(made, datamodule=Noise(), verbose=False)


# --- who it was -------------------------------------------------------------------------------------------------------


def test_odd_visits_are_told_apart(make_batch):
    """By brute force: voxels of the padding do not count, and int16 steps are thousandths."""
    batch = make_batch(pairs=3, size=(6, 5, 4))
    batch.extent[:] = torch.tensor([5, 4, 3])
    batch.images[0, 0, 0, 5, 4, 3] = torch.nan  # padding
    batch.images[0, 1, 0, :2, 0, 0] = torch.inf
    batch.images[1, 0, 0, :5, :4, :3] = 0.25
    batch.images[2, 1, 0, 1, 1, 1] = -2e4
    assert odd_visits({"labelled": batch}) == [
        "the visit in row 1 is NaN or infinite in 2 voxels",
        "the visit in row 2 is constant (0.25) within its box",
        "the visit in row 5 holds values up to 2e+04, while tissue is about 1",
    ]
    assert not images_finite(batch)
    steps = make_batch(pairs=1)
    steps.images = (steps.images * 1000).short()
    assert odd_visits(steps) == []


def test_names_come_from_the_table(make_batch):
    data = Noise()
    data.setup("fit")
    assert named_visits(make_batch(pairs=1), data.table) == ["sub-0 ses-0", "sub-0 ses-1"]
    assert named_visits(torch.zeros(2), data.table) == []
