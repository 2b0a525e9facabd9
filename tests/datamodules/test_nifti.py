"""Visits from NIfTI files: what is read, on a made cohort and on real MRI."""

# ruff: noqa: F811

from __future__ import annotations

import os
from pathlib import Path

import jsonargparse
import lightning as L
import nibabel as nib
import numpy as np
import pytest
import torch
from nifti_cohort import AFFINE, SHAPE, cohort, head, image_path, save, setup  # noqa: F401
from omegaconf import OmegaConf

from lssl.data.nifti import automatic_foreground, read_grid, read_image, scale
from lssl.datamodules.nifti import NiftiDataModule
from lssl.utils.errors import InputError

REPOSITORY = Path(__file__).parents[2]
REAL = Path(os.environ.get("LSSL_REAL_DATA", REPOSITORY / "../shared/data"))
real = [
    pytest.mark.real,
    pytest.mark.skipif(not (REAL / "mri").is_dir(), reason=f"no real MRI in {REAL}; set LSSL_REAL_DATA"),
]


def test_a_folder_becomes_batches(cohort):
    source = setup(cohort, source_size=12)
    assert source.summary.startswith("4 subjects, 6 visits: 2 pairs from 2 subjects")
    assert source.shapes().tolist() == [list(SHAPE)] * 6
    batch = next(iter(source.train_dataloader()))
    assert batch.images.shape == (2, 2, 1, 12, 12, 12)
    assert batch.images.dtype == torch.float32
    assert batch.affines.dtype == torch.float64
    assert batch.labels is None
    with pytest.raises(InputError, match="smallest being sub-a ses-01 with 18×20×16"):
        source.check_crop((18, 18, 18))


def test_masks_and_labels_arrive_with_their_visit(cohort):
    mask, label = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.float32)
    mask[4:9, 3:9, 5:10], label[5, 5, 5] = 1, 7
    save(cohort / "derivatives/masks/sub-a_mask.nii.gz", mask)
    save(cohort / "derivatives/seg/sub-a_ses-02_dseg.nii.gz", label)
    source = setup(
        cohort, masks="derivatives/masks/{subject}_mask.nii.gz", labels="derivatives/seg/{subject}_{session}_*"
    )
    first, second = source.read(0), source.read(1)
    assert first.foreground.numpy().tolist() == mask.astype(bool).tolist()
    assert first.label is None
    assert second.label.dtype == torch.int16
    assert second.label.sum() == second.label[5, 5, 5] == 7
    assert source.read(4).foreground.any()
    assert (
        "; 4 visits without a mask; their foreground is found automatically; 5 visits without a label" in source.summary
    )


def test_voxels_are_turned_to_canonical_axes(tmp_path):
    voxels = head() + np.arange(SHAPE[0])[:, None, None]
    save(tmp_path / "ras.nii.gz", voxels)
    turned = nib.Nifti1Image(voxels, AFFINE).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    nib.save(turned, tmp_path / "turned.nii.gz")
    (straight, affine), (back, affine_back) = (
        read_image(str(tmp_path / f"{name}.nii.gz")) for name in ("ras", "turned")
    )
    assert turned.shape != SHAPE
    np.testing.assert_array_equal(straight, back)
    np.testing.assert_allclose(affine, affine_back, atol=1e-5)
    assert read_grid(str(tmp_path / "turned.nii.gz")).same(read_grid(str(tmp_path / "ras.nii.gz")))


def test_a_trailing_axis_of_one_is_squeezed_and_a_series_refused(tmp_path):
    save(tmp_path / "one.nii.gz", head()[..., None])
    assert read_image(str(tmp_path / "one.nii.gz"))[0].shape == SHAPE
    save(tmp_path / "series.nii.gz", np.stack([head()] * 3, -1))
    with pytest.raises(InputError, match=r"series.nii.gz has the shape 18×20×16×3, but a visit is one 3D volume"):
        read_grid(str(tmp_path / "series.nii.gz"))


def test_foreground_is_the_head_with_its_hollows():
    image = head((40, 44, 36))
    found = automatic_foreground(image)
    axes = [np.linspace(-1, 1, length) for length in image.shape]
    truth = np.sqrt(sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij"))) < 0.8
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.93
    normalised = np.where(truth, np.random.default_rng(0).standard_normal(image.shape), 0).astype(np.float32)
    found = automatic_foreground(normalised)
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.9


def test_scaling_keeps_zero_and_puts_bright_tissue_at_one():
    image = head()
    image[0, 0, 0] = 0
    inside = automatic_foreground(image)
    scaled = scale(image, inside)
    assert scaled.dtype == np.float32
    assert np.percentile(scaled[inside], 99.9) == pytest.approx(1, abs=1e-3)
    assert scaled[0, 0, 0] == scaled.min() == 0
    np.testing.assert_allclose(scale(image * 7, inside), scaled, rtol=1e-5)


def test_scaling_of_signed_images_puts_the_background_at_zero():
    inside = head() > 200
    normalised = np.where(inside, np.random.default_rng(0).standard_normal(SHAPE), 0).astype(np.float32)
    scaled = scale(normalised, inside)
    assert (scaled[~inside] == 0).all()
    assert scaled[inside].mean() == pytest.approx(0.5, abs=0.05)
    offset = scale(head() - 1000, inside)
    assert offset[~inside].max() < 0.1
    assert offset.min() == 0


def test_what_is_excluded_is_counted_and_must_exist(cohort):
    source = setup(cohort, exclude=["sub-a ses-02"])
    assert "excluded: 1 visit as exclude asks" in source.summary
    assert ("sub-a", "ses-02") not in set(zip(source.table["subject"], source.table["session"], strict=True))
    assert "sub-a" not in setup(cohort, exclude=["sub-a"]).subjects
    with pytest.raises(InputError, match="exclude: there is no subject or visit 'sub-a ses-20'; did you mean"):
        setup(cohort, exclude=["sub-a ses-20"])


def test_a_csv_names_the_files(cohort):
    table = cohort / "visits.csv"
    lines = [
        f"{s},{v},{image_path(cohort, s, v).relative_to(cohort)},{d},val"
        for s, v, d in (("a", "01", 0), ("a", "02", 99))
    ]
    table.write_text("subject,session,image,days,split\n" + "\n".join(lines) + "\n")
    source = setup(None, table=table)
    assert source.val_pairs.tolist() == [[0, 1]]
    table.write_text("subject,session,image\na,01,gone.nii.gz\n")
    with pytest.raises(InputError, match=r"gone.nii.gz does not exist; correct its path"):
        setup(None, table=table)
    with pytest.raises(InputError, match="There is no data: give root"):
        NiftiDataModule()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["nifti", "prepared", "phantom"])
def test_configs_name_options_that_exist(name):
    config = OmegaConf.to_container(OmegaConf.load(REPOSITORY / f"configs/data/{name}.yaml"))
    config["data"]["class_path"] = f"lssl.datamodules.{name}.{config['data']['class_path']}"
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=L.LightningDataModule)
    parsed = parser.parse_object(config).data  # refuses options that do not exist
    for key, value in config["data"].get("init_args", {}).items():
        assert parsed.init_args[key] == value or isinstance(value, list), key


class TestReal:
    pytestmark = real

    def test_flair_pairs(self):
        source = setup(REAL / "mri", suffix="FLAIR")
        pairs = np.concatenate([source.train_pairs, source.val_pairs, source.test_pairs])
        subjects = source.table["subject"].to_numpy()
        true = {subjects[row] for row, later in pairs if row != later}
        assert {"sub-oms01", "sub-oms03", "sub-oms19"} == true
        single = {subjects[row] for row, later in pairs if row == later}
        assert {"sub-oms04", "sub-oms09", "sub-oms20", "sub-omx07", "sub-omx19", "sub-mls18"} == single
        ages = source.table.set_index(["subject", "session"])["age"]
        assert ages["sub-oms03", "ses-02"] == 20.84
        times = source.table.set_index(["subject", "session"])["time"]
        assert times["sub-oms03", "ses-02"] == pytest.approx(671 / 365.25)

    def test_t1w_has_one_pair_and_no_contrast_images(self):
        source = setup(REAL / "mri", suffix="T1w", single_visits="drop")
        pairs = np.concatenate([source.train_pairs, source.val_pairs, source.test_pairs])
        assert source.table["subject"].iloc[pairs[:, 0]].tolist() == ["sub-oms01"]
        assert "2 images with contrast agent" in source.summary
        ages = source.table.set_index("subject")["age"]
        assert ages["sub-ixi013"] == 46.71

    def test_visits_of_a_pair_show_the_same_head(self):
        source = setup(REAL / "mri", suffix="FLAIR", masks="derivatives/masks/{subject}/anat/*_mask.nii.gz")
        row = source.table["subject"].tolist().index("sub-oms01")
        first, second = source.read(row), source.read(row + 1)
        assert torch.equal(first.affine, second.affine)
        inside = first.foreground
        both = torch.stack([first.image[0][inside], second.image[0][inside]])
        assert torch.corrcoef(both)[0, 1] > 0.9
        for visit in (first, second):
            assert visit.image.min() == 0
            assert 0.9 < torch.quantile(visit.image[0][inside][::7], 0.999) < 1.1

    def test_automatic_foreground_holds_the_brain(self):
        source = setup(REAL / "mri", suffix="FLAIR", masks="derivatives/masks/{subject}/anat/*_mask.nii.gz")
        for row in range(len(source.table)):
            if source.table["subject"][row] == "sub-oms19":  # its mask covers the skull
                continue
            visit = source.read(row)
            found = torch.from_numpy(automatic_foreground(visit.image[0].numpy()))
            tissue = visit.foreground & (visit.image[0] > 0)  # masks of stripped images also hold emptied voxels
            assert (found & tissue).sum() > 0.9 * tissue.sum()
            assert 0.1 < found.float().mean() < 0.6

    def test_visits_as_scanned_are_sent_to_prepare(self):
        with pytest.raises(InputError, match=r"ses-01 and ses-02 of sub-01 lie on different grids .*`lssl prepare`"):
            setup(REAL / "raw", suffix="FLAIR")
