"""A prepared folder that a stranger has edited by hand: one sentence that names the file, or the right values."""

from __future__ import annotations

import os
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from helpers import few
from mutations import command
from scipy.ndimage import gaussian_filter

from lssl.cli.main import main
from lssl.datamodules.prepared import PreparedDataModule
from lssl.utils.errors import InputError

VOXELS = (20, 20, 20)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """As `lssl prepare` leaves it: three subjects of two visits."""
    place = tmp_path_factory.mktemp("hostile")
    ball = np.linalg.norm(np.mgrid[:20, :20, :20] - 9.5, axis=0) < 8
    for subject in range(3):
        head = gaussian_filter(np.random.default_rng(subject).random(VOXELS), 1.5) * 1000
        for visit in range(2):
            folder = place / "bids" / f"sub-{subject}" / f"ses-M{visit}2" / "anat"
            folder.mkdir(parents=True)
            draw = np.random.default_rng([subject, visit])
            voxels = (ball * (head - 300 + 10 * draw.random(VOXELS))).clip(0).astype(np.int16)
            path = folder / f"sub-{subject}_ses-M{visit}2_T1w.nii.gz"
            nib.save(nib.Nifti1Image(voxels, np.diag([8.0, 8.0, 8.0, 1.0])), path)
    main(["prepare", str(place / "bids"), str(place / "out"), "--spacing", "8"])
    return place / "out"


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


def used(folder):
    """What a run would read, or the sentence."""
    try:
        source = PreparedDataModule(folder, source_size=16, split=(1.0, 0.0, 0.0))
        source.setup("fit")
        source.check_crop([8, 8, 8])
        batches = list(source.train_dataloader())
    except InputError as error:
        sentence = str(error)
        return sentence if str(folder) in sentence else None
    assert all(bool(batch.images.isfinite().all()) for batch in batches)
    assert all(bool(batch.affines.isfinite().all()) for batch in batches)
    assert all(np.linalg.norm(batch.affines[0, 0, :3, :3], axis=0) == pytest.approx(8, abs=0.01) for batch in batches)
    return source


def every_command(folder):
    """Each ends with 0, or with 2 and a sentence; a traceback raises here."""
    command("inspect", str(folder))
    command("inspect", str(folder), "--all")
    command("prepare", str(folder.parent / "nothing"), str(folder))


DAMAGED = ["[]", "null", "5", '"x"', "", '{"options":', '{"options": []}', '{"options": null}', '{"options": "abc"}']
DAMAGED += ['{"options": {"suffixes": [{}]}}', '{"options": {"suffixes": 5}}', "[" * 100000, '{"options": {}}\0']


@pytest.mark.parametrize("text", few(DAMAGED, 3), ids=range(len(DAMAGED)))
def test_a_damaged_description(folder, text):
    (folder / "dataset.json").write_text(text)
    assert f"{folder / 'dataset.json'} is" in used(folder)
    every_command(folder)


@pytest.mark.parametrize("encoding", few(["utf-16", "utf-8-sig", "latin-1"], 1))
def test_a_description_in_another_encoding_is_read(folder, encoding):
    path = folder / "dataset.json"
    path.write_bytes(path.read_text().replace('"lssl"', '"ü"').encode(encoding))
    assert len(used(folder).table) == 6


SIZES = ["abc", "-5", "0", "", "1e300", "nan", "inf", "30.5", "[30]", "9" * 30, "1e5"]


@pytest.mark.parametrize("size", few(SIZES, 3))
def test_a_size_that_is_none(folder, size):
    edit(folder, "size_d", size)
    assert f"{folder / 'visits.csv'}: the size of sub-0 ses-M02" in used(folder)
    every_command(folder)


def edit(folder, column, value):
    table = pd.read_csv(folder / "visits.csv", dtype=str)
    table[column] = table[column].astype(object)
    table.loc[0, column] = value
    table.to_csv(folder / "visits.csv", index=False)


ODD = [("image", "/etc/passwd"), ("image", "visits"), ("image", "x" * 5000), ("image", ""), ("image", "../../a.b2nd")]


@pytest.mark.parametrize(("column", "value"), few([*ODD, ("subject", ""), ("session", "")], 2))
def test_a_visit_that_is_none_is_left_out_and_counted(folder, column, value):
    edit(folder, column, value)
    source = used(folder)
    assert len(source.table) == 5
    assert "1 visit" in source.summary or "1 line" in source.summary
    every_command(folder)


def test_a_size_of_another_file_is_told_before_the_work(folder):
    size = int(pd.read_csv(folder / "visits.csv")["size_d"][0])
    edit(folder, "size_d", str(size + 1))
    source = used(folder)
    assert len(source.table) == 5
    assert f"but the table says {size + 1}" in source.summary


TIMES = [(column, value) for column in ("age", "days") for value in ("1e300", "-1e300", "inf", "nan", "x", "[60]")]


@pytest.mark.parametrize(("column", "value"), few(TIMES, 3))
def test_an_impossible_time_is_unknown(folder, column, value):
    edit(folder, column, value)
    table = used(folder).table
    assert (table["age"].isna() | table["age"].between(0, 130)).all()
    assert not np.isinf(table["time"]).any()
    assert (table["time"].abs().fillna(0) < 130).all()
    every_command(folder)


CELLS = [
    ("flags", "x" * 10**7),
    ("subject", "../../x"),
    ("subject", "s" * 10**7),
    ("site", "[1, 2]"),
    ("channels", "5"),
]


@pytest.mark.parametrize(("column", "value"), few(CELLS, 2), ids=range(len(CELLS)))
def test_an_odd_cell(folder, column, value):
    edit(folder, column, value)
    used(folder)
    every_command(folder)


def first(content: bytes) -> bytes:
    return content.splitlines(True)[1]


BYTES = {
    "mark": lambda content: b"\xef\xbb\xbf" + content,
    "line ends": lambda content: content.replace(b"\n", b"\r\n"),
    "old line ends": lambda content: content.replace(b"\n", b"\r"),
    "semicolons": lambda content: content.replace(b",", b";"),
    "utf-16": lambda content: content.decode().encode("utf-16"),
    "zero bytes": lambda content: content.replace(b"sub-1", b"sub\0"),
    "a row twice": lambda content: content + first(content),
    "an image twice": lambda content: content + first(content).replace(b"ses-M02,", b"ses-M99,", 1),
    "empty": lambda content: b"",
    "no rows": lambda content: content.splitlines(True)[0],
    "a column twice": lambda content: content.replace(b"size_h", b"size_d"),
    "an open quote": lambda content: content.replace(b"sub-1", b'"sub-1'),
    "noise": lambda content: np.random.default_rng(0).bytes(3000),
}


@pytest.mark.parametrize("kind", few([*BYTES], 7))
@pytest.mark.parametrize("name", few(["visits.csv", "quality.csv"], 1))
def test_odd_bytes_of_a_table(folder, name, kind):
    path = folder / name
    path.write_bytes(BYTES[kind](path.read_bytes()))
    result = used(folder)
    if name == "quality.csv" or kind in ("mark", "line ends", "old line ends", "semicolons", "utf-16"):
        assert len(result.table) == 6
    elif kind == "an open quote":  # it swallows lines
        assert "2 lines of visits.csv without session" in result.summary
    else:
        assert isinstance(result, str)
    every_command(folder)


@pytest.mark.parametrize(
    "text", few(["[]", "[", "5", "{}", '{"visits": 5}', '{"inputs": {}, "visits": [5], "left": {}}'], 2)
)
def test_a_damaged_record_is_made_anew(folder, whole, text):
    record = folder / "records" / "sub-0.json"
    record.write_text(text)
    main(["prepare", str(whole.parent / "bids"), str(folder), "--spacing", "8"])
    assert record.stat().st_size > 100
    assert len(used(folder).table) == 6


@pytest.mark.parametrize("affine", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.diag([1e300, 1, 1, 1])])
def test_voxels_of_no_size(folder, affine):
    from lssl.data.store import write_stored

    path = folder / pd.read_csv(folder / "visits.csv")["image"][0]
    shape = tuple(pd.read_csv(folder / "visits.csv")[["size_d", "size_h", "size_w"]].iloc[0])
    os.unlink(path)
    voxels = np.ones((1, *shape), np.float32)
    write_stored(path, voxels, voxels[0] > 0, None, affine, ["T1w"], [(0.0, 500.0)], {})
    source = used(folder)
    assert len(source.table) == 5
    assert "is damaged" in source.summary
