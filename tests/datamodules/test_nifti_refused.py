"""Visits from NIfTI files that cannot be used: refused or left out in one sentence."""

# ruff: noqa: F811

from __future__ import annotations

import gzip
import os
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from nifti_cohort import AFFINE, SHAPE, cohort, head, image_path, save, setup  # noqa: F401

from lssl.data import usable
from lssl.data.nifti import read_label, read_mask
from lssl.datamodules.nifti import NiftiDataModule
from lssl.utils.errors import InputError


def damaged(root: Path, what: str) -> Path:
    path = image_path(root, "a", "02")
    voxels = head()
    if what == "nan":
        voxels[3, 4, 5] = np.nan
    if what == "constant":
        voxels[:] = 3
    save(path, voxels)
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    if what == "short":
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-5000]))
    if what == "text":
        path.write_text("not an image")
    if what == "grid":
        save(path, head((18, 20, 17)))
    if what == "space":
        moved = AFFINE.copy()
        moved[0, 3] += 3
        save(path, affine=moved)
    if what == "flat":
        save(path, head()[:, :, 0])
    if what == "nowhere":
        image = nib.load(path)
        raw = bytearray(gzip.decompress(path.read_bytes()))
        raw[280:328] = np.zeros(12, np.float32).tobytes()  # srow_x, srow_y, srow_z
        assert image.header["sform_code"] > 0
        path.write_bytes(gzip.compress(bytes(raw)))
    return path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("grid", r"visits ses-01 and ses-02 of sub-a lie on different grids \(18×20×16 and 18×20×17.*`lssl prepare`"),
        ("space", r"visits ses-01 and ses-02 of sub-a lie in different spaces .* 3 mm\).*`lssl prepare`"),
    ],
)
def test_visits_that_are_not_aligned_stop_setup(cohort, what, message):
    damaged(cohort, what)
    with pytest.raises(InputError, match=message):
        setup(cohort)


UNUSABLE = [
    ("text", "sub-a_ses-02_T1w.nii.gz cannot be read and seems damaged or cut off"),
    ("flat", "has the shape 18×20, but a visit is one 3D volume"),
    ("nowhere", "sub-a_ses-02_T1w.nii.gz has no valid affine"),
    ("truncated", "sub-a_ses-02_T1w.nii.gz cannot be read and seems damaged or cut off"),
    ("short", "sub-a_ses-02_T1w.nii.gz cannot be read and seems damaged or cut off"),
    ("nan", "sub-a_ses-02_T1w.nii.gz holds 1 voxels that are NaN or infinite"),
    ("constant", "sub-a_ses-02_T1w.nii.gz is constant: every voxel is 3"),
]


@pytest.mark.parametrize(("what", "message"), UNUSABLE)
def test_a_visit_that_cannot_be_used_is_left_out_before_training(cohort, what, message):
    whole = setup(cohort, split=(1, 0, 0))
    damaged(cohort, what)
    source = setup(cohort, split=(1, 0, 0))
    assert len(source.table) == len(whole.table) - 1
    assert "1 visit that cannot be read (sub-a ses-02: " in source.summary
    assert message in source.summary
    list(source.train_dataloader())


def test_a_verdict_is_kept_until_the_content_changes(cohort, monkeypatch):
    setup(cohort)
    monkeypatch.setitem(usable.READERS, "image", None)  # nothing is read again
    for path in cohort.rglob("*.nii.gz"):
        os.utime(path)
    setup(cohort)
    monkeypatch.undo()
    damaged(cohort, "nan")
    assert "holds 1 voxels that are NaN" in setup(cohort).summary


def test_a_worker_passes_the_refusal_on(cohort):
    source = setup(cohort, split=(1, 0, 0), num_workers=1)
    damaged(cohort, "nan")  # after the files were checked
    with pytest.raises(InputError, match=r"sub-a_ses-02_T1w.nii.gz holds 1 voxels"):
        list(source.train_dataloader())


def test_a_bad_setup_stays_bad(cohort):
    damaged(cohort, "grid")
    source = NiftiDataModule(cohort)
    for _ in range(2):
        with pytest.raises(InputError, match="different grids"):
            source.setup()


def test_bad_masks_and_labels_are_refused(cohort):
    save(cohort / "masks/sub-a.nii.gz", np.ones((5, 5, 5), np.uint8))
    with pytest.raises(
        InputError, match=r"mask .*sub-a.nii.gz does not lie on the grid .* of sub-a ses-01 \(5×5×5 and"
    ):
        setup(cohort, masks="masks/{subject}.nii.gz")
    empty = str(save(cohort / "empty.nii.gz", np.zeros(SHAPE, np.uint8)))
    with pytest.raises(InputError, match=r"mask .*empty.nii.gz is empty"):
        read_mask(empty)
    soft = str(save(cohort / "soft.nii.gz", np.full(SHAPE, 0.3, np.float32)))
    with pytest.raises(
        InputError, match=r"label map .*soft.nii.gz holds 0.3 and 5759 other values that are not whole numbers"
    ):
        read_label(soft)


def test_a_label_map_of_several_visits_needs_visits_that_are_aligned(tmp_path):
    """One protocol gives one grid, which says nothing of where the head lies."""
    for session in ("01", "02"):
        save(image_path(tmp_path / "raw", "a", session))
        named = image_path(tmp_path / "registered", "a", session)
        save(named.with_name(named.name.replace("_T1w", "_space-half_T1w")))
    for root in ("raw", "registered"):
        label = tmp_path / root / "derivatives/labels/sub-a_dseg.nii.gz"
        save(label, (head() > 0).astype(np.int16))
    pattern = "derivatives/labels/{subject}_dseg.nii.gz"
    with pytest.raises(InputError, match=r"serves several visits, sub-a ses-01 among them, .*`lssl prepare`"):
        setup(tmp_path / "raw", labels=pattern)
    source = setup(tmp_path / "registered", labels=pattern)
    assert any("2 visits (sub-a ses-01, …) share the label of their subject" in note for note in source.notes)
    source = setup(tmp_path / "raw", masks=pattern)
    assert any("share the mask of their subject, as if they were aligned" in note for note in source.notes)


def test_many_files_are_announced_and_one_process_checks_them_for_all(bids, monkeypatch, caplog):
    monkeypatch.setattr(usable, "MANY", 10)
    source = NiftiDataModule(bids)
    source.trainer = SimpleNamespace(world_size=2)
    with caplog.at_level("INFO"):
        source.prepare_data()
    assert "10 image files are read to check them" in caplog.text
    monkeypatch.setattr(usable, "READERS", {})  # the others find its answers
    caplog.clear()
    other = NiftiDataModule(bids)
    other.setup()
    assert len(other.table) == 10
    assert "are read to check" not in caplog.text
