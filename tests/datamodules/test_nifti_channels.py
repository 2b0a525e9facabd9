"""Several suffixes are channels of one image."""

# ruff: noqa: F811

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nifti_cohort import AFFINE, SHAPE, cohort, head, image_path, save, setup  # noqa: F401

from lssl.data.nifti import automatic_foreground, read_image, scale
from lssl.datamodules.nifti import NiftiDataModule
from lssl.utils.errors import InputError


def test_several_suffixes_are_channels_in_their_order(cohort):
    """Each is scaled by itself; a visit that lacks one is left out and named."""
    flairs = {}
    for subject, session in [("a", "01"), ("a", "02"), ("b", "M000"), ("b", "M012"), ("c", "01")]:
        flairs[subject, session] = 7 * head()[::-1].copy() + 3
        save(image_path(cohort, subject, session, "FLAIR"), flairs[subject, session])
    save(image_path(cohort, "e", "01", "FLAIR"))
    source = setup(cohort, suffix=["FLAIR", "T1w"])
    assert source.channels() == ["FLAIR", "T1w"]
    assert len(source.table) == 5
    assert any("1 visit with T1w but without FLAIR (sub-d ses-01)" in note for note in source.notes)
    assert any("1 visit with FLAIR but without T1w (sub-e ses-01)" in note for note in source.notes)
    row = source.table.index[source.table["subject"] == "sub-c"][0]
    flair, t1 = (read_image(image_path(cohort, "c", "01", suffix))[0] for suffix in ("FLAIR", "T1w"))
    foreground = automatic_foreground(flair)
    image = source.read(row).image.numpy()
    np.testing.assert_array_equal(image, np.stack([scale(flair, foreground), scale(t1, foreground)]))


def test_a_channel_on_another_grid_returns_to_the_first(cohort):
    """A ramp along a world axis is a ramp on any grid; one that lies elsewhere is refused."""
    other = np.diag([2.0, 2.0, 2.0, 1.0])
    other[:3, 3] = (-20, -19, -18)
    ramp = np.broadcast_to((np.arange(30) * 2.0 - 19)[None, :, None] + 50, (30, 30, 30)).astype(np.float32)
    for subject, session in [("a", "01"), ("a", "02")]:
        save(image_path(cohort, subject, session, "FLAIR"), ramp, other)
    source = setup(cohort, suffix=["T1w", "FLAIR"])
    assert any("2 FLAIR images on another grid, resampled to the grid of the T1w" in note for note in source.notes)
    visit = source.read(0)
    assert visit.image.shape == (2, *SHAPE)
    np.testing.assert_allclose(visit.affine, AFFINE)
    steps = np.diff(visit.image[1].numpy(), axis=1)[2:-2, 2:-2, 2:-2]
    assert steps.min() > 0.9 * steps.max() > 0
    other[:3, 3] = 500
    save(image_path(cohort, "a", "02", "FLAIR"), ramp, other)
    with pytest.raises(InputError, match=r"a_ses-02_FLAIR.*a_ses-02_T1w.*share no place in space"):
        setup(cohort, suffix=["T1w", "FLAIR"])


def test_a_table_has_a_column_per_channel(tmp_path):
    lines = ["subject,session,T1w,FLAIR,days"]
    for number in range(2):
        for session in range(2):
            name = f"{number}{session}"
            save(tmp_path / f"t1_{name}.nii.gz", head() + number)
            save(tmp_path / f"flair_{name}.nii.gz", 5 * head()[::-1].copy() + session)
            flair = "" if name == "11" else f"flair_{name}.nii.gz"
            lines.append(f"s{number},v{session},t1_{name}.nii.gz,{flair},{365 * session}")
    table = tmp_path / "visits.csv"
    table.write_text("\n".join(lines) + "\n")
    source = NiftiDataModule(table=table, suffix=["FLAIR", "T1w"])
    source.setup()
    assert source.channels() == ["FLAIR", "T1w"]
    assert [Path(path).name for path in source.table["image_1"]] == ["t1_00.nii.gz", "t1_01.nii.gz", "t1_10.nii.gz"]
    assert any("1 line of visits.csv without FLAIR, the first being 5" in note for note in source.notes)
    one = read_image(str(tmp_path / "flair_00.nii.gz"))[0]
    np.testing.assert_array_equal(source.read(0).image[0].numpy(), scale(one, automatic_foreground(one)))
    alone = NiftiDataModule(table=table, suffix="FLAIR")
    alone.setup()
    assert Path(alone.table["image"].iat[0]).name == "flair_00.nii.gz"
    with pytest.raises(InputError, match=r"has no column T2w, but suffix asks for T1w, T2w"):
        NiftiDataModule(table=table, suffix=["T1w", "T2w"]).setup()


def test_visits_that_lack_a_channel_are_kept_if_asked_with_zeros_there(cohort):
    """Also the first channel: the grid and the head are then those of the other, and times are of all visits."""
    flair = 7 * head()[::-1].copy() + 3
    for subject, session in [("a", "02"), ("b", "M000"), ("e", "01")]:
        save(image_path(cohort, subject, session, "FLAIR"), flair)
    image_path(cohort, "a", "02").unlink()
    source = setup(cohort, suffix=["T1w", "FLAIR"], missing_channels="keep")
    names = (source.table["subject"] + " " + source.table["session"]).tolist()
    assert names == [f"sub-{name}" for name in ("a ses-01", "a ses-02", "b ses-M000", "b ses-M012", "c ses-01")] + [
        "sub-d ses-01",
        "sub-e ses-01",
    ]
    t1, other = [True, False], [False, True]
    assert source.present().tolist() == [t1, other, [True, True], t1, t1, t1, other]
    assert any("2 visits without T1w (sub-a ses-02, sub-e ses-01)" in note for note in source.notes)
    assert any("4 visits without FLAIR (sub-a ses-01, " in note for note in source.notes)
    assert np.diff(source.table["time"].iloc[2:4]) == pytest.approx(1.0)
    visit = source.read(1)
    assert visit.present.tolist() == other
    assert not visit.image[0].any()
    foreground = automatic_foreground(flair)
    np.testing.assert_array_equal(visit.image[1].numpy(), scale(flair, foreground))
    np.testing.assert_array_equal(visit.foreground.numpy(), foreground)
    assert source.read(2).present is None
    assert source.read(2).image.flatten(1).any(1).all()
    batch = next(iter(source._whole(np.array([0]))))
    assert batch.present.tolist() == [[t1, t1]]
    assert setup(cohort, suffix=["T1w", "FLAIR"]).present() is None


def test_a_channel_of_no_visit_is_refused_in_training_alone(cohort):
    source = NiftiDataModule(cohort, suffix=["T1w", "FLAIR"], missing_channels="keep")
    with pytest.raises(InputError, match="No visit has the channel FLAIR"):
        source.setup("fit")
    source = NiftiDataModule(cohort, suffix=["T1w", "FLAIR"], missing_channels="keep")
    source.setup("predict")
    assert source.present().tolist() == [[True, False]] * 6
    with pytest.raises(InputError, match=r"matches sub-.*T2w"):
        NiftiDataModule(cohort, suffix=["T2w", "FLAIR"], missing_channels="keep").setup("predict")
    with pytest.raises(InputError, match="missing_channels is 'maybe'; choose drop or keep"):
        NiftiDataModule(cohort, missing_channels="maybe")


def test_a_table_may_leave_cells_of_channels_empty(tmp_path):
    for name in ("t1_a", "flair_b", "t1_c", "flair_c"):
        save(tmp_path / f"{name}.nii.gz")
    rows = ["a,1,t1_a.nii.gz,", "b,1,,flair_b.nii.gz", "c,1,t1_c.nii.gz,flair_c.nii.gz", "d,1,,"]
    (tmp_path / "visits.csv").write_text("\n".join(["subject,session,T1w,FLAIR", *rows]) + "\n")
    options = {"table": tmp_path / "visits.csv", "suffix": ["T1w", "FLAIR"]}
    source = NiftiDataModule(**options, missing_channels="keep")
    source.setup()
    assert source.table["subject"].tolist() == ["a", "b", "c"]
    assert source.present().tolist() == [[True, False], [False, True], [True, True]]
    assert [Path(path).name for path in source.table["image"]] == ["t1_a.nii.gz", "flair_b.nii.gz", "t1_c.nii.gz"]
    assert any("1 line of visits.csv without image of T1w or FLAIR, the first being 5" in note for note in source.notes)
    assert not source.read(1).image[0].any()
