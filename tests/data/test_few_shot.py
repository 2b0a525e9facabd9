"""Few-shot: which labels training sees, how labelled and unlabelled pairs come, and single files."""

from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from lssl.data.datamodule import PairDataModule
from lssl.data.few_shot import FewShot, choose_labelled, repeated
from lssl.datamodules.nifti import NiftiDataModule
from lssl.datamodules.phantom import PhantomDataModule
from lssl.utils.errors import InputError

SUBJECT = np.repeat(np.arange(6), 3)
ROWS = np.flatnonzero(np.arange(18) % 3 < 2)  # two of three visits are labelled


def test_all_labels_by_default():
    assert choose_labelled(ROWS, SUBJECT, FewShot()).tolist() == ROWS.tolist()


def test_one_shot_rotates_with_the_seed():
    chosen = [choose_labelled(ROWS, SUBJECT, FewShot(subjects=1, visits=1, seed=seed)) for seed in range(6)]
    assert all(len(rows) == 1 and rows[0] in ROWS for rows in chosen)
    assert sorted(SUBJECT[rows[0]] for rows in chosen) == list(range(6))
    again = choose_labelled(ROWS, SUBJECT, FewShot(subjects=1, visits=1, seed=3))
    assert again.tolist() == chosen[3].tolist()


def test_several_subjects_with_all_their_visits():
    rows = choose_labelled(ROWS, SUBJECT, FewShot(subjects=2, seed=1))
    assert len(rows) == 4
    other = choose_labelled(ROWS, SUBJECT, FewShot(subjects=2, seed=2))
    assert not set(SUBJECT[rows]) & set(SUBJECT[other])
    with pytest.raises(InputError, match="7 subjects are asked for, but 6 training subjects have a label"):
        choose_labelled(ROWS, SUBJECT, FewShot(subjects=7))


@pytest.mark.parametrize("wrong", [{"subjects": 0}, {"visits": 0}, {"batch_size": 0}, {"steps": 0}])
def test_refused_numbers(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        FewShot(**wrong)


@pytest.fixture(scope="module")
def phantom():
    few = FewShot(subjects=1, visits=1, batch_size=2, steps=3)
    data = PhantomDataModule(subjects=5, visits=2, size=16, spacing=12.0, split=(0.6, 0.2, 0.2), few_shot=few)
    data.setup("fit")
    return data


def test_pretraining_is_as_before(phantom):
    phantom.supervised = False
    assert next(iter(phantom.train_dataloader())).labels is not None


def test_labels_of_all_but_the_chosen_visit_are_withheld(phantom):
    phantom.use_labels(unlabelled_pairs=True)
    loaders = phantom.train_dataloader()
    (row,) = phantom.labelled_rows("train")
    labelled = list(loaders["labelled"])
    assert len(labelled) == 3
    for batch in labelled:
        assert batch.session.tolist() == [[row, row]] * 2
        assert (batch.labels >= 0).all()
    for batch in loaders["unlabelled"]:
        assert batch.labels is None
        assert (batch.session[:, 0] != batch.session[:, 1]).all()
    phantom.use_labels(unlabelled_pairs=False)
    assert set(phantom.train_dataloader()) == {"labelled"}


def test_held_out_visits_come_once_and_whole(phantom):
    phantom.use_labels(unlabelled_pairs=False)
    for loader, split in ((phantom.val_dataloader(), "val"), (phantom.test_dataloader(), "test")):
        rows = [batch.session[0].tolist() for batch in loader]
        expected = np.flatnonzero(phantom.table["split"] == split)
        assert rows == [[row, row] for row in expected]
    assert next(iter(phantom.val_dataloader())).images.shape[-3:] == (16, 16, 16)


def test_both_loaders_last_equally_long_and_none_starts_over(phantom):
    """Two pairs a batch: the labelled loader has three batches, the other one of three subjects goes on with passes."""
    phantom.use_labels(unlabelled_pairs=True)
    loaders = phantom.train_dataloader()
    assert {name: len(loader) for name, loader in loaders.items()} == {"labelled": 3, "unlabelled": 3}
    order = {name: list(loader.sampler) for name, loader in loaders.items()}
    assert {name: len(items) for name, items in order.items()} == {"labelled": 6, "unlabelled": 6}
    assert len({row for row, *_ in order["unlabelled"][:3]}) == len({row for row, *_ in order["unlabelled"][3:]}) == 3
    assert len({seed for *_, seed in order["labelled"]}) == 6  # boxes are drawn anew for every item
    assert order == {name: list(loader.sampler) for name, loader in phantom.train_dataloader().items()}


def test_no_label_at_all(bids):
    data = NiftiDataModule(bids)
    data.setup("fit")
    data.use_labels(unlabelled_pairs=True)
    assert not len(data.labelled_rows("train"))
    with pytest.raises(InputError, match="no labelled visit to train on"):
        data.train_dataloader()


def test_a_single_file(bids):
    path = next(bids.glob("sub-02/ses-M012/anat/*.nii.gz"))
    data = NiftiDataModule(path)
    data.setup("predict")
    assert data.table[["subject", "session"]].to_numpy().tolist() == [["sub-02", "ses-M012"]]
    (batch,) = data.predict_dataloader()
    assert batch.images.shape == (1, 2, 1, 40, 40, 40)
    with pytest.raises(InputError, match="is no image"):
        NiftiDataModule(__file__).setup("predict")


def test_prediction_takes_visits_on_other_grids(bids):
    path = next(bids.glob("sub-02/ses-M012/anat/*.nii.gz"))
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[:30], image.affine), path)
    with pytest.raises(InputError, match="different grids"):
        NiftiDataModule(bids).setup("fit")
    data = NiftiDataModule(bids)
    data.setup("predict")
    assert len(data.table) == 10


@pytest.mark.parametrize(("value", "words"), [(0.5, "not whole numbers"), (-2, "negative value -2")])
def test_labels_that_are_none(value, words, bids):
    """One bad label map costs its visit the label; where all are bad, training is refused."""
    images = sorted(bids.glob("sub-*/ses-*/anat/*_T1w.nii.gz"))
    for number, image in enumerate(images):
        of = nib.load(image)
        label = np.full(of.shape, 1 if number else value, np.float32)
        nib.save(nib.Nifti1Image(label, of.affine), image.with_name(image.name.replace("T1w", "dseg")))
    data = NiftiDataModule(bids, labels="{subject}/{session}/anat/*_dseg.nii.gz")
    data.setup("fit")
    assert data.has_label().tolist() == [False] + [True] * 9
    assert "1 label left (sub-01 ses-M000: " in data.summary
    assert words in data.summary
    for image in images:
        nib.save(nib.Nifti1Image(np.full(of.shape, value, np.float32), of.affine), str(image).replace("T1w", "dseg"))
    with pytest.raises(InputError, match=words):
        NiftiDataModule(bids, labels="{subject}/{session}/anat/*_dseg.nii.gz").setup("fit")


def test_voxel_size_from_the_headers(bids):
    data = NiftiDataModule(bids)
    data.setup("fit")
    np.testing.assert_allclose(data.voxel_sizes(), np.full((10, 3), 4.0))
    assert isinstance(data, PairDataModule)


def test_a_run_shorter_than_an_epoch_is_one_epoch():
    few, rows = FewShot(batch_size=2, steps=5), np.arange(3)
    run = SimpleNamespace(max_steps=2, accumulate_grad_batches=2)
    assert len(repeated(rows, few)) == 10
    assert repeated(rows, few, run).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    run.max_steps = -1
    assert len(repeated(rows, few, run)) == 10
