"""Visits that cannot be read: the run stops and names them, or skips the pair, lists it and counts it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lssl.data.loading import FilledLoader, PairDataset, pair_loader
from lssl.data.read_errors import SkipList, other_pairs, read_error, skipped_reads
from lssl.guards import SkippedReads
from lssl.utils.errors import InputError, input_error

sys.path.insert(0, str(Path(__file__).parents[1] / "guards"))
from small import Noise, mean, segmenter, trainer


class Failing(Noise):
    """Subjects of three visits, some of which fail when they are read."""

    def __init__(self, bad=(), error=None, **options):
        super().__init__(**options)
        self.bad, self.error = set(bad), error or OSError("input/output error")

    def visit_table(self):
        rows = [(f"sub-{s}", f"ses-{v}", 40.0 + v, float(v)) for s in range(self.subjects_in_all) for v in range(3)]
        return pd.DataFrame(rows, columns=["subject", "session", "age", "time"])

    def read(self, row):
        if row in self.bad:
            raise self.error
        return super().read(row)


def everything(data):
    """Rows of every training pair of an epoch."""
    batches = [batch for batch in data.train_dataloader() if batch is not None]
    return [tuple(rows) for batch in batches for rows in batch.session.tolist()]


def made(bad, workers=0, batch_size=2, folder=None, **options):
    data = Failing(bad, subjects=4, split=(1.0, 0.0, 0.0), num_workers=workers, batch_size=batch_size, **options)
    data.setup("fit")
    if folder is not None:
        data.trainer = trainer(folder)
    return data


def test_stop_names_the_visits_of_a_source_of_ones_own():
    with pytest.raises(InputError, match=r"^sub-1 ses-. and sub-1 ses-. cannot be read \(input/output error\)"):
        everything(made({3, 4, 5}))


def test_a_sentence_of_a_reader_is_not_its_own_cause():
    with pytest.raises(InputError, match="damaged") as found:
        everything(made({3, 4, 5}, error=InputError("/data/x.nii is damaged.")))
    assert found.value.__cause__ is None


def test_a_bug_in_a_reader_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        everything(made({3, 4, 5}, error=ZeroDivisionError(), on_error="skip"))


def test_an_error_that_names_no_file_gets_the_names():
    assert str(read_error(InputError("It is damaged."), "sub-1 ses-2")) == "sub-1 ses-2: It is damaged."
    named = InputError("/data/x.nii is damaged.")
    assert read_error(named, "sub-1 ses-2") is named


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_takes_another_pair_of_the_same_subject(workers, tmp_path, capfd):
    """Rows 3 to 5 are one subject: of its three pairs, the one without row 3 is left."""
    data = made({3}, workers, folder=tmp_path, on_error="skip", pairs_per_subject="all")
    whole = made((), pairs_per_subject="all")
    read, wanted = everything(data), everything(whole)
    assert len(read) == len(wanted)
    for got, pair in zip(read, wanted, strict=True):
        assert got == ((4, 5) if 3 in pair else pair)
    rows = skipped_reads(tmp_path)
    assert sorted(row[0] for row in rows) == ["sub-1 ses-0 and sub-1 ses-1", "sub-1 ses-0 and sub-1 ses-2"]
    assert {row[2] for row in rows} == {"sub-1 ses-1 and sub-1 ses-2"}
    assert "input/output error" in capfd.readouterr().err


def test_which_pair_is_drawn_depends_on_the_seed_alone():
    pairs = np.array([[0, 1], [0, 2], [1, 2], [3, 4]])
    subject = np.array([0, 0, 0, 1, 1])
    seen = {seed: other_pairs(pairs, subject, (0, 1), seed) for seed in range(20)}
    assert seen == {seed: other_pairs(pairs, subject, (0, 1), seed) for seed in range(20)}
    assert {tuple(order) for order in seen.values()} == {((0, 2), (1, 2)), ((1, 2), (0, 2))}
    assert other_pairs(pairs, subject, (3, 4), 0) == []
    assert sorted(other_pairs(pairs, subject, (3, 4), 0, same_visit=True)) == [(3, 3), (4, 4)]
    three = other_pairs(pairs, subject, (0, 1), 0, same_visit=True)
    assert sorted(three[:2]) == [(0, 2), (1, 2)]
    assert sorted(three[2:]) == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize(("single", "instead"), [("same", "sub-1 ses-2"), ("drop", "nothing")])
def test_the_last_visit_of_a_subject_is_used_as_a_single_visit_is(single, instead, tmp_path):
    read = everything(made({3, 4}, folder=tmp_path, on_error="skip", single_visits=single))
    assert ((5, 5) in read) == (single == "same")
    assert [row[2] for row in skipped_reads(tmp_path)] == [instead]
    assert (tmp_path / "skipped_reads.csv").read_text().startswith("visits,why,instead")


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_subject_without_readable_pair_is_left_out(batch_size, tmp_path):
    data = made({3, 4, 5}, batch_size=batch_size, folder=tmp_path, on_error="skip")
    read = everything(data)
    assert sorted({row // 3 for pair in read for row in pair}) == [0, 2, 3]
    assert [row[2] for row in skipped_reads(tmp_path)] == ["nothing"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_list_that_cannot_be_written_ends_in_one_sentence(workers, tmp_path):
    data = made({3}, workers, folder=tmp_path, on_error="skip")
    loader = data.train_dataloader()
    loader.dataset.skips.path = Path("/dev/full")
    with pytest.raises(Exception, match="disk is full") as found:
        list(loader)
    assert str(input_error(found.value)) == "/dev/full could not be written: the disk is full."


def test_several_devices_never_get_smaller_batches(tmp_path):
    data = made({3, 4, 5}, folder=tmp_path, on_error="skip")
    loader = data.train_dataloader()
    loader.dataset.skips.alone = False
    with pytest.raises(InputError, match="sub-1"):
        list(loader)


def test_evaluation_leaves_a_pair_out_and_replaces_none():
    pairs = np.array([[0, 1], [2, 2], [3, 4]])
    data = made({1, 2})
    dataset = PairDataset(
        data.read_visits, pairs, np.array([0] * 3 + [1] * 3), np.zeros(6), np.zeros(6), skips=SkipList(None)
    )
    loader = pair_loader(dataset, 1, 0)
    assert isinstance(loader, FilledLoader)
    assert [batch.session.tolist() for batch in loader] == [[[3, 4]]]


@pytest.mark.parametrize("task", [mean, segmenter])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_runs_go_on_and_count(task, batch_size, tmp_path):
    """Subject 1 has no readable visit, and one visit of subject 2 is bad, in training, validation and prediction."""
    data = Failing({3, 4, 5, 7}, subjects=8, split=(0.5, 0.5, 0.0), on_error="skip", batch_size=batch_size)
    data.few_shot.batch_size = batch_size
    data.has_label = lambda: np.ones(len(data.table), bool)
    data.read_label = lambda row: None if row in data.bad else Noise.read(data, row).label.numpy()
    run = trainer(tmp_path, max_steps=8)
    with pytest.warns(UserWarning, match="skipped so far because of visits that cannot be read"):
        run.fit(task(), datamodule=data)
    assert run.global_step == 8
    counter = next(each for each in run.callbacks if isinstance(each, SkippedReads))
    assert counter.number == len(skipped_reads(tmp_path)) > 0
    if task is mean:
        predicted = run.predict(task(), datamodule=data)
        assert sorted(int(part["session"]) for part in predicted) == sorted({*range(24)} - data.bad)
    assert all(bool(weight.isfinite().all()) for weight in torch.nn.ParameterList(run.model.parameters()))


def test_a_wrong_choice():
    with pytest.raises(InputError, match="on_error is 'ignore'; choose stop or skip"):
        Noise(on_error="ignore")
