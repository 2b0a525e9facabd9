"""Masks and label maps in `lssl prepare`: whose they are, where they lie, and what becomes of them."""

from __future__ import annotations

import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scans import image_path, rigid, save, scan

from lssl.cli.main import main
from lssl.data.store import read_stored

COARSE = (8.0, 8.0, 8.0)


@pytest.fixture
def bids(tmp_path) -> Path:
    """One subject, whose second visit is turned and lies on a grid of its own."""
    first, second = scan(None, COARSE), scan(rigid(12, 20, 1), COARSE, 1)
    second.affine[0, 3] += 4
    save(first, image_path(tmp_path / "bids", "a", "M000"))
    save(second, image_path(tmp_path / "bids", "a", "M012"))
    return tmp_path / "bids"


def derived(root: Path, session: str, ending: str) -> Path:
    place = f"sub-a/ses-{session}" if session else "sub-a"
    name = f"sub-a_ses-{session}" if session else "sub-a"
    return root / f"derivatives/x/{place}/anat/{name}_{ending}.nii.gz"


def label_of(root: Path, session: str) -> tuple[np.ndarray, np.ndarray]:
    image = nib.load(image_path(root, "a", session))
    return (np.asarray(image.dataobj) > 150).astype(np.int16) * 7, image.affine


def write(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)


def prepare(root: Path, out: Path, *options: str) -> tuple[pd.DataFrame, int]:
    status = 0
    try:
        main(["prepare", str(root), str(out), "--spacing", "8", *options])
    except SystemExit as stop:
        status = int(stop.code or 0)
    table = pd.read_csv(out / "visits.csv").merge(pd.read_csv(out / "quality.csv"), on=["subject", "session"])
    return table, status


def labels(out: Path, table: pd.DataFrame) -> list[np.ndarray]:
    stored = [read_stored(out / path) for path in table["image"]]
    return [visit.box((0, 0, 0), visit.shape)[2] for visit in stored]


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * ((one > 0) & (other > 0)).sum() / ((one > 0).sum() + (other > 0).sum())


def test_a_five_hundredth_of_a_voxel_changes_nothing(bids, tmp_path, capsys):
    for session in ("M000", "M012"):
        voxels, affine = label_of(bids, session)
        affine[:3, 3] += 0.002
        write(derived(bids, session, "dseg"), voxels, affine)
        write(derived(bids, session, "desc-brain_mask"), (voxels > 0).astype(np.uint8), affine)
    table, status = prepare(bids, tmp_path / "out")
    assert status == 0
    assert table["labelled"].all()
    assert table["foreground"].tolist() == ["mask", "mask"]
    assert table["label_from"].tolist() == ["own", "own"]
    said = capsys.readouterr().out
    assert "2 label maps found for 2 visits: taken for 2, left for 0." in said
    out = tmp_path / "out"
    assert said.endswith(f"Folder: {out}\nNext: lssl fit --config longitudinal_infonce --data {out}\n")


@pytest.mark.slow
def test_another_grid_is_resampled_with_a_word_and_another_place_left(bids, tmp_path, capsys):
    voxels, affine = label_of(bids, "M000")
    padded, moved = np.pad(voxels, 3), affine.copy()
    moved[:3, 3] -= affine[:3, :3] @ [3, 3, 3]
    write(derived(bids, "M000", "dseg"), padded, moved)
    voxels, affine = label_of(bids, "M012")
    affine[:3, 3] += 120
    write(derived(bids, "M012", "dseg"), voxels, affine)
    table, status = prepare(bids, tmp_path / "out")
    text = capsys.readouterr().out
    assert status == 0
    assert table["labelled"].tolist() == [True, False]
    assert "taken for 1 (1 resampled from a grid of its own), left for 1." in text
    assert "sub-a_ses-M012_dseg.nii.gz lies on another grid than" in text
    plain = tmp_path / "plain"
    derived(bids, "M012", "dseg").unlink()
    write(derived(bids, "M000", "dseg"), *label_of(bids, "M000"))
    again, _ = prepare(bids, plain)
    np.testing.assert_array_equal(labels(tmp_path / "out", table)[0], labels(plain, again)[0])


def test_a_label_without_session_belongs_to_the_visit_whose_grid_it_has(bids, tmp_path, capsys):
    write(derived(bids, "", "dseg"), *label_of(bids, "M012"))
    table, _ = prepare(bids, tmp_path / "out")
    assert table["label_from"].tolist() == ["ses-M012", "own"]
    first, second = labels(tmp_path / "out", table)
    np.testing.assert_array_equal(first, second)  # both lie in the frame, where the second visit's map brought it
    stored = read_stored(tmp_path / "out" / table["image"][0])
    image, _, label = stored.box((0, 0, 0), stored.shape)
    assert dice(label, image[0] > 450) > 0.8  # on the first visit's own tissue, too
    assert "1 from another visit of the subject" in capsys.readouterr().out


def test_a_label_without_session_on_the_grid_of_two_visits_is_refused_by_name(bids, tmp_path, capsys):
    save(scan(rigid(12, 20, 1), COARSE, 1), image_path(bids, "a", "M012"))  # now on the first one's grid
    write(derived(bids, "", "dseg"), *label_of(bids, "M000"))
    table, _ = prepare(bids, tmp_path / "out")
    assert not table["labelled"].any()
    text = capsys.readouterr().out
    assert "sub-a_dseg.nii.gz names no session, and lies on the grids of 2 of the 2 visits" in text


def test_a_bad_label_map_costs_the_label_alone(bids, tmp_path, capsys):
    voxels, affine = label_of(bids, "M000")
    write(derived(bids, "M000", "dseg"), voxels + np.float32(0.5), affine)
    write(derived(bids, "M012", "dseg"), *label_of(bids, "M012"))
    table, _ = prepare(bids, tmp_path / "out")
    assert table["labelled"].tolist() == [False, True]
    assert "that are not whole numbers" in capsys.readouterr().out


def test_classes_that_resampling_destroys_are_said(bids, tmp_path, capsys):
    voxels, affine = label_of(bids, "M000")
    voxels[12, 12, 12] = 9
    write(derived(bids, "M000", "dseg"), voxels, affine)
    table, _ = prepare(bids, tmp_path / "out", "--spacing", "24")
    assert "9 (1 voxels)" in table["lost_classes"][0]
    assert "holds none: 9 in 1 visit; choose a smaller --spacing." in capsys.readouterr().out


@pytest.mark.slow
def test_among_several_label_maps_the_user_chooses_by_pasting(bids, tmp_path, capsys, monkeypatch):
    """Each kind is a command that can be typed as it is, and takes that kind."""
    monkeypatch.chdir(tmp_path)
    for session in ("M000", "M012"):
        voxels, affine = label_of(bids, session)
        for kind, number in (("desc-aparc_dseg", 7), ("desc-tissue_dseg", 1)):
            write(derived(bids, session, kind), voxels // 7 * number, affine)
    main(["inspect", "bids"])
    said = capsys.readouterr().out
    assert "2 visits with several label maps, none of which is taken; say which by --labels" in " ".join(said.split())
    lines = said[said.index("Next: ") :].strip().splitlines()
    typed = [shlex.split(line.removeprefix("Next: ").strip())[1:] for line in lines]
    pattern = "derivatives/x/{subject}/{session}/anat/{subject}_{session}_desc-%s_dseg.nii.gz"
    assert [words[-2:] for words in typed] == [["--labels", pattern % kind] for kind in ("aparc", "tissue")]
    main(typed[1])
    assert "2 label maps found for 2 visits: taken for 2, left for 0." in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "bids-prepared/visits.csv")
    assert [set(np.unique(label)) for label in labels(tmp_path / "bids-prepared", table)] == [{0, 1}] * 2
