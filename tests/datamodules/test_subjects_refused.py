"""What of a SubjectsDataset cannot be used is said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchio as tio
from helpers import sentence
from torchio_cohort import FLIPPED, cohort, on_disk, visit

from lssl.datamodules.subjects import SubjectsDataModule
from lssl.utils.errors import InputError


def without(name):
    def change(one):
        one.pop(name)

    return change


def other_grid(one):
    one["seg"] = tio.LabelMap(tensor=torch.ones(1, 8, 8, 8))


def scalar_label(one):
    one["seg"] = tio.ScalarImage(tensor=one["seg"].data.float(), affine=one["seg"].affine)


def nan(one):
    one["t1"].data[0, 3, 3, 3] = float("nan")


def halves(one):
    one["seg"].set_data(one["seg"].data / 2)


def singular(one):
    one["t1"].affine = np.zeros((4, 4))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            without("subject_id"),
            "Item 0 of the dataset has no attribute 'subject_id'.*its attributes are: age, session",
        ),
        (without("session"), "no attribute 'session'"),
        (without("t1"), r"No subject of the dataset has the image 't1'.*seg \(LabelMap\)"),
        (without("seg"), r"has the image 'seg', as label asks; its images are: t1 \(ScalarImage\)"),
        (other_grid, "seg of item 0 does not lie on the grid of t1"),
        (scalar_label, "seg of item 0 is a ScalarImage; it must be a torchio.LabelMap"),
        (nan, "t1 of item 0 holds 1 voxels that are NaN"),
        (halves, "seg of item 0 holds 0.5 and"),
        (singular, "t1 of item 0 has no valid affine"),
    ],
)
def test_what_cannot_be_used_is_said(change, says):
    dataset = cohort()
    for one in dataset.dry_iter():
        change(one)
    source = SubjectsDataModule(dataset, label="seg")
    with pytest.raises(InputError, match=says):
        source.setup("fit") or source.read(0)


def test_visits_in_different_places_are_refused():
    dataset = tio.SubjectsDataset([visit(1, 0), visit(1, 1, FLIPPED)])
    with pytest.raises(InputError, match=r"visits 0 and 1 of sub-1 lie in different spaces.*co-register"):
        SubjectsDataModule(dataset).setup("fit")


def test_damaged_files_are_found_before_training(tmp_path):
    """SimpleITK, by which TorchIO reads, fills the missing end of a file with zeros and says nothing."""
    _, dataset = on_disk(tmp_path, FLIPPED)
    path = tmp_path / "sub-2_1_t1.nii.gz"
    path.write_bytes(path.read_bytes()[:-999])
    source = SubjectsDataModule(dataset, label="seg")
    source.setup("fit")
    assert "1 visit that cannot be read (sub-2 1: " in source.summary
    assert len(source.table) == 7
    assert [source.dataset.dry_iter()[place]["session"] for place in source.table["index"]] == [0, 1, 0, 1, 0, 0, 1]
    path = tmp_path / "sub-3_1_seg.nii.gz"
    path.write_bytes(path.read_bytes()[:-99])
    with pytest.raises(InputError, match=r"sub-3_1_seg\.nii\.gz cannot be read and seems damaged"):
        SubjectsDataModule(dataset, label="seg").setup("fit")


def test_what_a_dataset_raises_names_the_item():
    dataset = cohort()
    dataset.set_transform(tio.Lambda(lambda voxels: 1 / 0))
    source = SubjectsDataModule(dataset, batch_size=1)
    source.setup("fit")
    with pytest.raises(
        InputError, match=r"Item \d of the dataset cannot be read \(ZeroDivisionError: division by zero\)"
    ):
        next(iter(source.train_dataloader()))


def test_no_dataset_or_another_one_is_refused(capsys):
    with pytest.raises(InputError, match=r"dataset is TensorDataset; give a torchio\.SubjectsDataset"):
        SubjectsDataModule(torch.utils.data.TensorDataset(torch.zeros(1)))
    said = sentence(capsys, "fit", "--config", "longitudinal_infonce", "--data", "lssl.datamodules.SubjectsDataModule")
    assert "dataset" in said
