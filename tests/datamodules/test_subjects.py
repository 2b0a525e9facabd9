"""Visits from a TorchIO SubjectsDataset are those of the same NIfTI files."""

from __future__ import annotations

import sys

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import torchio as tio
from helpers import TINY_NET, fit, tiny
from torchio_cohort import COHORT, FLIPPED, SIDE, cohort, on_disk, visit

from lssl.cli.main import main
from lssl.data.source import DataSource
from lssl.datamodules.nifti import NiftiDataModule
from lssl.datamodules.subjects import SubjectsDataModule
from lssl.utils.errors import InputError

TURNED = np.array([[0.8, -0.6, 0, 3], [0.6, 0.8, 0, -7], [0, 0, 1, 11], [0, 0, 0, 1]]) @ np.diag([1.5, 1, 2, 1])


@pytest.mark.parametrize("affine", [FLIPPED, TURNED], ids=["LPS", "oblique"])
def test_visits_are_those_of_the_same_files(tmp_path, affine):
    table, stored = on_disk(tmp_path, affine)
    wanted = NiftiDataModule(table=table)
    wanted.setup("fit")
    for dataset in (stored, cohort(affine=affine)):
        found = SubjectsDataModule(dataset, label="seg")
        assert isinstance(found, DataSource)
        found.setup("fit")
        columns = ["subject", "session", "age", "time", "split"]
        pd.testing.assert_frame_equal(found.table[columns], wanted.table[columns])
        np.testing.assert_array_equal(found.train_pairs, wanted.train_pairs)
        np.testing.assert_array_equal(found.shapes(), wanted.shapes())
        np.testing.assert_allclose(found.voxel_sizes(), wanted.voxel_sizes(), atol=1e-6)
        for row in range(len(wanted.table)):
            one, other = found.read(row), wanted.read(row)
            torch.testing.assert_close(one.affine, other.affine, atol=1e-4, rtol=0)
            torch.testing.assert_close(one.image, other.image)
            assert torch.equal(one.foreground, other.foreground)
            assert torch.equal(one.label, other.label)
            np.testing.assert_array_equal(found.read_label(row), other.label)


def test_attributes_mean_what_they_mean_in_a_table():
    facts = [("b", "late", "2012-03-01", "X"), ("b", "early", "2010-03-01", "X"), ("a", "only", "2011-01-01", "y")]
    subjects = []
    for person, session, date, site in facts:
        one = visit(1, 1)
        for name in ("subject_id", "session", "age"):
            one.pop(name)
        one.update({"who": person, "wave": session, "date": date, "site": site, "split": "Train"})
        subjects.append(one)
    source = SubjectsDataModule(tio.SubjectsDataset(subjects), subject="who", session="wave")
    source.setup()
    assert source.table["session"].tolist() == ["only", "early", "late"]
    assert source.table["time"].iat[2] == pytest.approx(2, abs=0.01)
    assert source.table["site"].tolist() == ["y", "X", "X"]
    assert set(source.table["split"]) == {"train"}
    assert not source.has_label().any()  # no label was asked for


def test_a_visit_without_the_image_is_left_out_and_one_without_a_map_is_noted():
    subjects = list(cohort().dry_iter())
    subjects[0].pop("t1")
    subjects[3].pop("seg")
    source = SubjectsDataModule(tio.SubjectsDataset(subjects), label="seg")
    source.setup()
    assert "1 visit without t1" in source.summary
    assert "1 visit without a label" in source.summary
    assert len(source.table) == 7
    assert source.has_label().sum() == 6


def test_ages_may_be_numbers_of_torch_and_a_wrong_name_is_said():
    subjects = list(cohort().dry_iter())
    for one in subjects:
        one["years"] = torch.tensor(one["age"])
    source = SubjectsDataModule(tio.SubjectsDataset(subjects), age="years")
    source.setup()
    assert source.table["age"].tolist() == [60.0, 61.5, 61.0, 62.5, 62.0, 63.5, 63.0, 64.5]
    with pytest.raises(InputError, match="No subject of the dataset has the attribute 'yaers', as age asks"):
        SubjectsDataModule(tio.SubjectsDataset(subjects), age="yaers").setup()


def test_channels_and_mask():
    subjects = list(cohort().dry_iter())
    for one in subjects:
        one["flair"] = tio.ScalarImage(tensor=torch.cat([one["t1"].data, 1 + one["t1"].data]), affine=one["t1"].affine)
        one["brain"] = tio.LabelMap(tensor=(one["seg"].data == 2).short(), affine=one["t1"].affine)
    source = SubjectsDataModule(tio.SubjectsDataset(subjects), image=["t1", "flair"], mask="brain")
    assert source.channels() == ["t1", "flair 0", "flair 1"]
    read = source.read(0)
    assert read.image.shape == (3, SIDE, SIDE, SIDE)
    assert torch.equal(read.foreground, subjects[0]["brain"].data[0] > 0)


# --- the dataset's own transform --------------------------------------------------------------------------------------


def test_a_grid_that_the_dataset_changes_is_known_before_training():
    dataset = cohort()
    dataset.set_transform(tio.Compose([tio.ToCanonical(), tio.CropOrPad((32, 36, 44)), tio.RemapLabels({1: 5})]))
    source = SubjectsDataModule(dataset, label="seg")
    source.setup("fit")
    assert source.shapes().tolist() == [[32, 36, 44]] * 8
    changed, whole = source.read(0), SubjectsDataModule(cohort(), label="seg")
    whole.setup()
    before = whole.read(0)
    shift = torch.linalg.solve(before.affine, changed.affine)[:3, 3].round().long().tolist()
    assert shift == [4, 2, -2]
    assert torch.equal(changed.foreground[:, :, 2:42], before.foreground[4:36, 2:38])
    assert set(changed.label.unique().tolist()) == {0, 2, 5}
    source.check_crop((32, 36, 44))
    with pytest.raises(InputError, match="do not fit"):
        source.check_crop((40, 36, 44))
    assert "image" not in source.table  # predictions are written on the new grid


def roll(subject):
    for image in subject.get_images(intensity_only=False):
        image.set_data(image.data.roll(3, 1))
    return subject


class Rolled(tio.Transform):
    """A user's own: everything moves by three voxels, the affine stays."""

    def apply_transform(self, subject):
        return roll(subject)


def needs_a_large_head(subject):
    assert subject["t1"].shape[1] > 30, "small"
    return subject


@pytest.mark.parametrize(
    ("transform", "says"),
    [
        (tio.RandomAffine(), "RandomAffine moves the head"),
        (tio.Compose([tio.RandomNoise(), Rolled()]), "Rolled moves the head"),
        (roll, "roll moves the head"),
        (needs_a_large_head, "needs_a_large_head cannot be tried"),
    ],
)
def test_a_dataset_that_moves_heads_is_refused(transform, says):
    dataset = cohort()
    dataset.set_transform(transform)
    with pytest.raises(InputError, match=says):
        SubjectsDataModule(dataset, label="seg")


def test_transforms_find_the_images_that_they_name():
    dataset = cohort()
    dataset.set_transform(tio.Compose([tio.Resample("t1"), tio.ZNormalization(masking_method="seg")]))
    source = SubjectsDataModule(dataset, label="seg")
    source.setup()
    assert source.read(0).image.isfinite().all()


def test_random_draws_depend_on_the_pair_and_not_on_the_worker():
    dataset = cohort()
    dataset.set_transform(tio.RandomNoise(std=(5, 5)))

    def batches(workers):
        torch.manual_seed(workers)
        source = SubjectsDataModule(dataset, label="seg", batch_size=1, num_workers=workers, source_size=32)
        source.setup("fit")
        return [batch.images for batch in source.train_dataloader()]

    alone, shared = batches(0), batches(2)
    assert len(alone) == len(shared) == 3
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))
    source = SubjectsDataModule(dataset)
    source.setup()
    (first, _), (again, _) = (source.read_visits((2, 3), None, seed) for seed in (1, 2))
    assert not torch.equal(first.image, again.image)


# --- from a config ----------------------------------------------------------------------------------------------------


def test_a_config_pretrains_fine_tunes_and_predicts(tmp_path, monkeypatch):
    """Also with few-shot labels, and with label maps in the place of the images."""
    (tmp_path / "my_cohort.py").write_text(COHORT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    options = {
        "dataset": {"class_path": "my_cohort.cohort", "init_args": {"persons": 5}},
        "split": [0.6, 0.2, 0.2],
        "batch_size": 2,
        "num_workers": 0,
    }
    data = {"class_path": "lssl.datamodules.SubjectsDataModule", "init_args": options}
    short = ["--trainer.max_steps", "1"]
    run = fit(tmp_path, "longitudinal_infonce.yaml", backbone=TINY_NET, data=data, options=short)
    assert (run / "checkpoints/last.ckpt").is_file()
    options |= {"label": "seg", "few_shot": {"subjects": 1, "visits": 1}}
    start = ["--model.init_args.pretrained", str(run / "checkpoints/last.ckpt"), *short]
    tuned = fit(tmp_path, "finetune.yaml", backbone=TINY_NET, data=data, options=start)
    tuned = max(tuned.parent.glob("run*"), key=lambda folder: folder.stat().st_mtime)
    arguments = ["--config", str(tuned / "config.yaml"), *tiny(tmp_path, backbone=TINY_NET, data=data)]
    main(["predict", *arguments, "--ckpt_path", str(next(tuned.rglob("*.ckpt")))])
    maps = sorted(tmp_path.rglob("*_dseg.nii.gz"))
    assert len(maps) == 10
    assert np.allclose(nib.load(maps[0]).affine, np.diag([2.0, 2.0, 2.0, 1.0]))
    sys.modules.pop("my_cohort")
