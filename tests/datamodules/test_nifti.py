"""Visits from NIfTI files: what is read, and what is refused."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from types import SimpleNamespace

import jsonargparse
import lightning as L
import nibabel as nib
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lssl.data import usable
from lssl.data.nifti import automatic_foreground, read_grid, read_image, read_label, read_mask, scale
from lssl.datamodules.nifti import NiftiDataModule
from lssl.utils.errors import InputError

SHAPE = (18, 20, 16)
AFFINE = np.diag([1.5, 1.0, 2.0, 1.0])
AFFINE[:3, 3] = (-10, -9, -8)
REPOSITORY = Path(__file__).parents[2]
REAL = Path(os.environ.get("LSSL_REAL_DATA", REPOSITORY / "../shared/data"))
real = [
    pytest.mark.real,
    pytest.mark.skipif(not (REAL / "mri").is_dir(), reason=f"no real MRI in {REAL}; set LSSL_REAL_DATA"),
]


def head(shape=SHAPE, seed: int = 0) -> np.ndarray:
    """A bright noisy ellipsoid with a dark hollow, in faint noise."""
    rng = np.random.default_rng(seed)
    axes = [np.linspace(-1, 1, length) for length in shape]
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij")))
    image = np.where(radius < 0.8, 400.0, 0.0) * (radius > 0.2)
    return (image + 10 * rng.random(shape)).astype(np.float32)


def save(path: Path, voxels: np.ndarray | None = None, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(head() if voxels is None else voxels, affine), path)
    return path


def image_path(root: Path, subject: str, session: str, suffix: str = "T1w") -> Path:
    return root / f"sub-{subject}/ses-{session}/anat/sub-{subject}_ses-{session}_{suffix}.nii.gz"


@pytest.fixture
def cohort(tmp_path) -> Path:
    """Two subjects with two visits each, two with one."""
    visits = [("a", "01"), ("a", "02"), ("b", "M000"), ("b", "M012"), ("c", "01"), ("d", "01")]
    for seed, (subject, session) in enumerate(visits):
        save(image_path(tmp_path, subject, session), head(seed=seed))
    return tmp_path


def setup(root: Path, **options) -> NiftiDataModule:
    source = NiftiDataModule(root, **options)
    source.setup()
    return source


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


def test_what_is_excluded_is_counted_and_must_exist(cohort):
    source = setup(cohort, exclude=["sub-a ses-02"])
    assert "excluded: 1 visit as exclude asks" in source.summary
    assert ("sub-a", "ses-02") not in set(zip(source.table["subject"], source.table["session"], strict=True))
    assert "sub-a" not in setup(cohort, exclude=["sub-a"]).subjects
    with pytest.raises(InputError, match="exclude: there is no subject or visit 'sub-a ses-20'; did you mean"):
        setup(cohort, exclude=["sub-a ses-20"])


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
