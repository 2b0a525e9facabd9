"""Tables of visits from nnssl's JSON and from HDF5 files of Ren et al.; both are written here as their authors do."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from helpers import sentence

from lssl.cli.main import main
from lssl.data.tables import csv_table

VOXELS = np.random.default_rng(0).random((2, 6, 5, 4))


# --- HDF5 -------------------------------------------------------------------------------------------------------------


def write_h5(path: Path, **groups: dict[str, np.ndarray]) -> Path:
    h5py = pytest.importorskip("h5py", reason="HDF5 files need the extra hdf5")
    with h5py.File(path, "w") as file:
        for name, arrays in groups.items():
            group = file.create_group(name)
            for key, value in arrays.items():
                group[key] = value
    return path


def test_visits_of_an_hdf5_file_keep_voxels_ages_and_size(tmp_path: Path, capsys):
    ages = np.array([[60.0], [61.5]])
    file = write_h5(tmp_path / "train.hdf5", **{"a/b": {"t1": VOXELS, "age": ages}, "s2": {"t1": VOXELS[:1]}})
    # h5py makes nested groups of a name with a slash, which no reader of the layout expects
    assert "is no group with the array t1" in sentence(
        capsys, "import", str(file), str(tmp_path / "x"), "--spacing", "1"
    )
    assert not (tmp_path / "x").exists()
    file = write_h5(tmp_path / "train.hdf5", **{"a b": {"t1": VOXELS, "age": ages}, "s2": {"t1": VOXELS[:1]}})
    main(["import", str(file), str(tmp_path / "out"), "--spacing", "1", "2", "3", "--axes", "LPS"])
    said = capsys.readouterr().out
    assert "3 visits of 2 subjects" in said
    assert "ages are taken as years" in said
    table, notes = csv_table(tmp_path / "out/visits.csv")
    assert table["subject"].tolist() == ["a b", "a b", "s2"]
    assert table["time"].tolist()[:2] == [0.0, 1.5]
    assert not notes
    image = nib.load(table["image"].iat[1])
    np.testing.assert_array_equal(np.asarray(image.dataobj), VOXELS[1].astype(np.float32))
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    assert image.header.get_zooms() == (1, 2, 3)
    np.testing.assert_allclose(image.affine @ [2.5, 2, 1.5, 1], [0, 0, 0, 1])  # its middle


def test_rows_without_a_subject_become_subjects_with_their_labels(tmp_path: Path, capsys):
    seg = (VOXELS * 33).astype(int).astype(float)
    file = write_h5(tmp_path / "seg.h5", img_seg_pair={"t1": VOXELS, "seg": seg, "age": np.ones((2, 1))})
    main(["import", str(file), str(tmp_path / "out"), "--spacing", "2"])
    assert "2 rows of img_seg_pair became subjects of their own" in capsys.readouterr().out
    table, _ = csv_table(tmp_path / "out/visits.csv")
    assert table["subject"].nunique() == 2
    label = np.asarray(nib.load(table["label"].iat[1]).dataobj)
    assert label.dtype == np.int16
    np.testing.assert_array_equal(label, seg[1])


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ({"s": {"t1": VOXELS[0]}}, ["--spacing", "1"], "must be (visits, W, H, D)"),
        ({"s": {"t2": VOXELS}}, ["--spacing", "1"], "is no group with the array t1"),
        ({"s": {"t1": VOXELS, "age": np.ones(3)}}, ["--spacing", "1"], "2 images but 3 ages"),
        ({"s": {"t1": VOXELS, "seg": VOXELS[:1]}}, ["--spacing", "1"], "s/seg has the shape"),
        ({"s": {"t1": VOXELS, "seg": VOXELS}}, ["--spacing", "1"], "no label map"),
        ({}, ["--spacing", "1"], "is empty"),
        ({"s": {"t1": VOXELS}}, [], "does not say its voxel size"),
        ({"s": {"t1": VOXELS}}, ["--spacing", "1", "2"], "one positive number, or three"),
        ({"s": {"t1": VOXELS}}, ["--spacing", "1", "--axes", "RRS"], "a letter of RL"),
        ({"s": {"t1": VOXELS}}, ["--spacing", "1", "--suffix", "T1w"], "one modality"),
    ],
)
def test_wrong_hdf5_files_are_refused_in_a_sentence(tmp_path: Path, capsys, groups, options, message: str):
    file = write_h5(tmp_path / "wrong.hdf5", **groups)
    assert message in sentence(capsys, "import", str(file), str(tmp_path / "out"), *options)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_hdf5_is_refused(tmp_path: Path, capsys):
    pytest.importorskip("h5py", reason="HDF5 files need the extra hdf5")
    (tmp_path / "wrong.hdf5").write_text("no")
    said = sentence(capsys, "import", str(tmp_path / "wrong.hdf5"), str(tmp_path / "out"), "--spacing", "1")
    assert "cannot be read as HDF5" in said


# --- nnssl ------------------------------------------------------------------------------------------------------------


def image(path: str, modality: str = "T1w", mask: str | None = None, **info) -> dict:
    return {
        "name": Path(path).name,
        "image_path": path,
        "modality": modality,
        "image_info": info,
        "associated_masks": {"anatomy_mask": mask, "anonymization_mask": None},
    }


def collection(**subjects: dict[str, list[dict]]) -> dict:
    held = {
        name: {
            "subject_id": name,
            "subject_info": {"age": 60.5, "sex": "f"},
            "sessions": {key: {"session_id": key, "session_info": {}, "images": ims} for key, ims in sessions.items()},
        }
        for name, sessions in subjects.items()
    }
    dataset = {"dataset_index": "ds1", "name": None, "dataset_info": {}, "subjects": held}
    return {"collection_index": 1, "collection_name": "Dataset001_X", "datasets": {"ds1": dataset}}


def write_json(folder: Path, content: dict) -> Path:
    path = folder / "pretrain_data.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def scans(tmp_path: Path, monkeypatch) -> Path:
    for name in ("a1", "a1_run-2", "a1_run-10", "a2", "b1", "mask", "a1_FLAIR"):
        nib.save(nib.Nifti1Image(VOXELS[0].astype(np.float32), np.eye(4)), tmp_path / f"{name}.nii.gz")
    monkeypatch.setenv("nnssl_raw", str(tmp_path))
    return tmp_path


def test_sessions_of_nnssl_become_visits(scans: Path, capsys):
    first = [image("$nnssl_raw/a1_run-2.nii.gz"), image("$nnssl_raw/a1_run-10.nii.gz", mask="$nnssl_raw/mask.nii.gz")]
    content = collection(
        a={"ses-1": first, "ses-2": [image("a2.nii.gz", days_since_baseline=365)]},
        b={"ses-1": [image("b1.nii.gz")], "ses-2": [image("gone.nii.gz")], "ses-3": [image("b1.nrrd")], "ses-4": []},
    )
    content["datasets"]["ds1"]["subjects"]["a"]["sessions"]["ses-1"]["session_info"] = {"days_since_baseline": 0}
    main(["import", str(write_json(scans, content)), str(scans / "out")])
    said = capsys.readouterr().out
    for part in (
        "3 visits of 2 subjects",
        "does not exist",
        "is no NIfTI file (.nrrd)",
        "no T1w image",
        "the last by name",
    ):
        assert part in said
    table, notes = csv_table(scans / "out/visits.csv")
    assert [Path(path).name for path in table["image"]] == ["a1_run-10.nii.gz", "a2.nii.gz", "b1.nii.gz"]
    assert Path(table["mask"].iat[0]).name == "mask.nii.gz"
    assert table["age"].tolist() == pytest.approx([60.5, 60.5 + 365 / 365.25, 60.5], abs=0.01)
    assert not notes


def test_modalities_become_channels_and_datasets_sites(scans: Path):
    content = collection(a={"ses-1": [image("a1.nii.gz"), image("a1_FLAIR.nii.gz", "FLAIR")]})
    content["datasets"]["ds2"] = content["datasets"]["ds1"]
    main(["import", str(write_json(scans, content)), str(scans / "out"), "--suffix", "t1w", "flair"])
    table = pd.read_csv(scans / "out/visits.csv")
    assert table["subject"].tolist() == ["ds1_a", "ds2_a"]
    assert table["site"].tolist() == ["ds1", "ds2"]
    assert Path(table["flair"].iat[0]).name == "a1_FLAIR.nii.gz"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"datasets": []}, [], "no mapping 'datasets'"),
        ({"datasets": {"d": {}}}, [], "dataset d has no mapping 'subjects'"),
        (
            collection(a={"s": [image("b1.nii.gz", "T2w")]}),
            [],
            "no image of modality T1w; name others with --suffix: T2w",
        ),
        (collection(a={"s": [image("gone.nii.gz")]}), [], "no session that can be used"),
        (collection(a={"s": [image("$nowhere_set/b1.nii.gz")]}), [], "environment variable nowhere_set is not set"),
        (collection(a={"s": ["b1.nii.gz"]}), [], "has no list 'images'"),
        (collection(a={"s": [image("b1.nii.gz")]}), ["--spacing", "1"], "are for HDF5 files"),
    ],
)
def test_wrong_json_files_are_refused_in_a_sentence(scans: Path, capsys, content, options, message: str):
    file = write_json(scans, content)
    assert message in sentence(capsys, "import", str(file), str(scans / "out"), *options)
    assert not (scans / "out").exists()


def test_other_files_and_used_folders_are_refused(scans: Path, capsys):
    (scans / "text.json").write_text("{")
    assert "cannot be read as JSON" in sentence(capsys, "import", str(scans / "text.json"), str(scans / "out"))
    assert "neither nnssl's" in sentence(capsys, "import", str(scans / "a1.nii.gz"), str(scans / "out"))
    assert "There is no file" in sentence(capsys, "import", str(scans / "no.json"), str(scans / "out"))
    assert "exists; give a new folder" in sentence(capsys, "import", str(scans / "text.json"), str(scans))
