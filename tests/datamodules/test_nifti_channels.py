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
