"""Labelled visits with their previous ones: which visit that is, and which pairs loaders give."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lssl.data.few_shot import FewShot
from lssl.data.previous import previous_visits
from lssl.datamodules.nifti import NiftiDataModule
from lssl.datamodules.phantom import PhantomDataModule
from lssl.utils.errors import InputError

NAN = float("nan")


def test_the_previous_visit_is_the_latest_earlier_one_of_known_order():
    rows = [
        ("a", 0.0, "time", -1),
        ("a", 1.0, "time", 0),
        ("a", 1.0, "time", 0),  # a second scan of one day is no earlier visit
        ("a", 3.0, "time", 2),
        ("b", 0.0, "time", -1),
        ("c", NAN, "", -1),
        ("c", NAN, "", -1),  # of unknown order
        ("d", NAN, "numbers", -1),
        ("d", NAN, "numbers", 7),  # of known order and unknown interval
    ]
    table = pd.DataFrame(rows, columns=["subject", "time", "ordered_by", "expected"])
    found = previous_visits(table, pd.factorize(table["subject"])[0])
    assert found.tolist() == table["expected"].tolist()


@pytest.fixture
def phantom():
    few = FewShot(subjects=2, visits=1, batch_size=2, steps=3)
    options = {"split": (0.5, 0.25, 0.25), "few_shot": few, "single_visit_fraction": 0.25}
    data = PhantomDataModule(subjects=8, visits=3, size=16, spacing=12.0, **options)
    data.setup("fit")
    return data


def test_labelled_visits_come_after_their_previous_ones(phantom, caplog):
    caplog.set_level("INFO")
    phantom.use_labels(unlabelled_pairs=False, previous="required")
    firsts = np.flatnonzero(phantom.table["visit"] == 0)
    assert f"{len(firsts)} labelled visits left out, without an earlier visit of known order" in caplog.text
    chosen = phantom.labelled_rows("train")
    assert len(chosen) == 2  # the few are drawn from those that can be used
    assert not {*chosen} & {*firsts}
    sessions = {tuple(pair) for batch in phantom.train_dataloader()["labelled"] for pair in batch.session.tolist()}
    assert sessions == {(row - 1, row) for row in chosen}
    for loader, split in ((phantom.val_dataloader(), "val"), (phantom.test_dataloader(), "test")):
        expected = np.flatnonzero((phantom.table["split"] == split) & (phantom.table["visit"] > 0))
        assert [batch.session[0].tolist() for batch in loader] == [[row - 1, row] for row in expected]
    later = [batch.session[0].tolist() for batch in phantom.predict_dataloader()]
    assert later == [[row - 1, row] for row in np.flatnonzero(phantom.table["visit"] > 0)]
    phantom.use_labels(unlabelled_pairs=False)
    assert next(iter(phantom.predict_dataloader())).session.tolist() == [[0, 0]]


def test_prediction_of_visits_without_an_order_is_one_sentence(bids):
    for path in sorted(bids.rglob("*M012*.nii.gz")):
        path.unlink()
    data = NiftiDataModule(bids)
    data.setup("predict")
    data.use_labels(unlabelled_pairs=False, previous="required")
    with pytest.raises(InputError, match="No visit has an earlier one of known order"):
        data.predict_dataloader()


def test_a_damaged_visit_is_not_replaced_by_a_visit_with_itself(phantom):
    """The label of a pair of one visit would be wrong: nothing has changed in it."""
    phantom.on_error = "skip"
    phantom.use_labels(unlabelled_pairs=False, previous="required")
    assert not phantom.train_dataloader()["labelled"].dataset.skips.same_visit
