"""The same scan under two names: other compression, header and axes; and where a copy is refused."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from lssl.data import duplicates
from lssl.data.duplicates import check_duplicates, find_duplicates, voxel_hash
from lssl.utils.errors import InputError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(duplicates, "_known", {})


def save(path, voxels, affine=None):
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return str(path)


@pytest.fixture
def scans(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 900, (6, 7, 8)).astype(np.int16)
    other = voxels.copy()
    other[2, 3, 4] += 1
    turned = nib.Nifti1Image(voxels, np.eye(4)).as_reoriented(np.array([[2, -1], [0, 1], [1, 1]]))
    nib.save(turned, tmp_path / "turned.nii.gz")
    paths = [
        save(tmp_path / "a.nii.gz", voxels),
        save(tmp_path / "other.nii.gz", other),
        save(tmp_path / "plain.nii", voxels.astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0])),
        str(tmp_path / "turned.nii.gz"),
        save(tmp_path / "small.nii", voxels[:5]),
    ]
    return pd.DataFrame({"subject": list("ABCDE"), "session": "1", "image": paths})


def test_copies_are_found_whatever_compression_header_and_axes(scans):
    assert find_duplicates(scans) == [[0, 2, 3]]
    assert "A 1 = C 1 = D 1" in check_duplicates(scans)
    assert check_duplicates(scans.iloc[[0, 1, 4]]) == ""


def test_a_copy_in_another_split_is_refused(scans):
    with pytest.raises(InputError, match=r"A 1 \(train\) and D 1 \(test\) are the same scan"):
        check_duplicates(scans.assign(split=["train", "test", "train", "test", "val"]))
    assert check_duplicates(scans.assign(split=["train", "test", "train", "train", "val"]))


def test_a_changed_file_is_hashed_again_and_an_unchanged_one_is_not_read(scans, monkeypatch):
    first = [voxel_hash(path) for path in scans["image"]]
    find_duplicates(scans)
    monkeypatch.setattr(duplicates, "_known", {})  # another process
    with monkeypatch.context() as patch:
        patch.setattr("lssl.data.nifti.read_image", lambda path: pytest.fail("read again"))
        assert find_duplicates(scans) == [[0, 2, 3]]
    save(scans["image"][0], np.random.default_rng(1).integers(0, 900, (6, 7, 8)).astype(np.int16))
    assert find_duplicates(scans) == [[2, 3]]
    assert voxel_hash(scans["image"][0]) != first[0]


def test_the_column_of_a_prepared_folder_goes_before_its_files_and_damage_is_no_copy(scans, tmp_path):
    assert find_duplicates(scans.assign(voxel_hash=["x", "y", "", "y", ""])) == [[1, 3]]
    (tmp_path / "a.nii.gz").write_bytes((tmp_path / "a.nii.gz").read_bytes()[:300])
    assert find_duplicates(scans) == [[2, 3]]
    assert find_duplicates(scans.drop(columns="image")) == []


def bids(root, scans):
    """Subject → voxels of its two visits."""
    for subject, visits in scans.items():
        for number, voxels in enumerate(visits):
            folder = root / f"sub-{subject}" / f"ses-{number}" / "anat"
            folder.mkdir(parents=True, exist_ok=True)
            save(folder / f"sub-{subject}_ses-{number}_T1w.nii.gz", voxels)
    return {"class_path": "NiftiDataModule", "init_args": {"root": str(root), "split": [0.5, 0.25, 0.25]}}


def test_fit_and_benchmark_refuse_a_scan_in_two_splits_and_inspect_names_it(tmp_path):
    from types import SimpleNamespace

    from lssl.benchmark.checks import check_leakage
    from lssl.datamodules.nifti import NiftiDataModule
    from lssl.prepare.inspection import inspect_folder

    random = np.random.default_rng(0)
    scans = {name: list(random.uniform(1, 9, (2, 12, 12, 12)).astype(np.float32)) for name in "abcdefgh"}
    data = bids(tmp_path, scans)
    module = NiftiDataModule(**data["init_args"])
    module.setup("fit")
    assert "same scan" not in module.summary
    splits = module.table.groupby("subject", observed=True)["split"].first()
    train, test = (next(name for name in splits.index if splits[name] == part) for part in ("train", "test"))
    twin = next(name for name in splits.index if splits[name] == "train" and name != train)
    cell = SimpleNamespace(stage="finetune", name="cell", config={"data": data})
    check_leakage([cell])

    bids(tmp_path, {**scans, twin[-1]: [scans[train[-1]][0], scans[twin[-1]][1]]})
    module = NiftiDataModule(**data["init_args"])
    module.setup("fit")  # both are trained on
    assert "the same scan under several names" in module.summary

    bids(tmp_path, {**scans, test[-1]: [scans[train[-1]][0], scans[test[-1]][1]]})
    with pytest.raises(InputError, match="are the same scan"):
        NiftiDataModule(**data["init_args"]).setup("fit")
    with pytest.raises(InputError, match="are the same scan"):
        check_leakage([cell])
    assert any("the same scan as" in reason for _, reason in inspect_folder(tmp_path, subjects=0).suspicious)


def test_benchmark_finds_the_copy_between_the_data_of_two_cells(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from lssl.benchmark import checks

    random = np.random.default_rng(0)
    images = [save(tmp_path / f"{name}.nii.gz", random.uniform(1, 9, (6, 7, 8)).astype(np.float32)) for name in "abc"]
    copy = save(tmp_path / "copy.nii", nib.load(images[2]).get_fdata(dtype=np.float32))
    columns = {"subject": ["a", "b", "c"], "session": "1", "split": ["train", "val", "test"]}
    tables = {"tuned": pd.DataFrame({**columns, "image": images})}
    tables["other"] = pd.DataFrame({"subject": ["x"], "session": "1", "split": ["train"], "image": [copy]})
    monkeypatch.setattr(checks, "_data", lambda cell: cell.name)
    monkeypatch.setattr(checks, "_instantiate", lambda name: SimpleNamespace(table=tables[name]))
    cells = [SimpleNamespace(name="other", stage="pretrain"), SimpleNamespace(name="tuned", stage="finetune")]
    with pytest.raises(InputError, match=r"x 1 \(train\)|c 1 \(test\)"):
        checks.check_leakage(cells)
    checks.check_leakage(cells[1:])


def test_every_channel_is_compared(scans):
    """One scan in the second channel of another visit, and in the first and second of a third."""
    table = scans.iloc[[1, 4, 0]].assign(image_1=[scans["image"][2], "", scans["image"][3]]).reset_index(drop=True)
    assert find_duplicates(table) == [[0, 2]]
