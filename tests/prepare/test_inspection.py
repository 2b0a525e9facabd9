"""`lssl inspect`: what it counts, and what it finds suspicious."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scans import REAL, image_path, rigid, save, scan

from lssl.cli.main import main
from lssl.data import usable
from lssl.datamodules.nifti import NiftiDataModule
from lssl.prepare.inspection import proposed_spacing


def told(capsys, *args: str) -> dict:
    main(["inspect", *args, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def bids(tmp_path_factory) -> Path:
    """a: one image twice; b: flipped; c: constant; d: moved although on one grid; e: no orientation, thick slices."""
    root = tmp_path_factory.mktemp("inspect") / "bids"
    coarse = (8.0, 8.0, 8.0)
    first = save(scan(None, coarse), image_path(root, "a", "M000"))
    image_path(root, "a", "M006").parent.mkdir(parents=True)
    shutil.copy(first, image_path(root, "a", "M006"))
    save(scan(None, coarse, subject=2), image_path(root, "b", "M000"))
    flipped = scan(rigid(2, 2), coarse, 1, subject=2)
    flipped.voxels = np.ascontiguousarray(flipped.voxels[::-1])
    save(flipped, image_path(root, "b", "M012"))
    constant = scan(None, coarse)
    constant.voxels[:] = 5
    save(constant, image_path(root, "c", "M000"))
    save(scan(None, coarse, subject=4), image_path(root, "d", "M000"))
    save(scan(rigid(6, 12), coarse, 1, subject=4), image_path(root, "d", "M036"))
    thick = scan(None, (4.0, 4.0, 9.0), subject=5)
    image = nib.Nifti1Image(thick.voxels, thick.affine)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    path = image_path(root, "e", "M000")
    path.parent.mkdir(parents=True)
    nib.save(image, path)
    (root / "participants.tsv").write_text("participant_id\tage\nsub-a\t61.5\n")
    return root


def test_a_bids_folder_is_counted_and_doubted(bids, capsys, tmp_path):
    report = told(capsys, str(bids), "--sheet", str(tmp_path / "sheet.png"))
    assert (report["subjects"], report["visits"]) == (5, 8)
    assert report["subjects_by_visits"] == {"1": 2, "2": 3}
    assert report["pairs"] == {"any": 3, "consecutive": 3, "baseline": 3}
    assert dict(zip(report["interval_years"]["from"], report["interval_years"]["pairs"], strict=True)) == {
        0.0: 0,
        0.25: 0,
        0.5: 1,
        1.0: 1,
        1.5: 0,
        2.0: 0,
        3.0: 1,
        5.0: 0,
        10.0: 0,
    }
    assert report["shapes"] == {"24×24×24": 7, "48×48×21": 1}
    assert report["spacings_mm"] == {"8×8×8": 7, "4×4×9": 1}
    assert report["orientations"]["none"] == 1
    assert report["without_age"] == 6
    found = {(entry["visit"], entry["reason"].split(":")[0]) for entry in report["suspicious"]}
    assert ("sub-a ses-M006", "the same scan as sub-a ses-M000") in found
    assert ("sub-b ses-M012", "left–right flipped against the visit before") in found
    assert ("sub-e ses-M000", "slices of 9 mm") in found
    assert ("sub-e ses-M000", "no orientation in its header") in found
    reasons = [entry["reason"] for entry in report["suspicious"]]
    assert any("is constant" in reason for reason in reasons)
    assert any(reason.startswith("not aligned with the visit before, by about 1") for reason in reasons)
    assert len(found) == 6
    assert report["gigabytes"] > 0
    assert report["hours_with_one_worker"] is not None
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


def test_two_persons_under_one_name_and_hot_voxels(tmp_path, capsys):
    voxels = (8.0, 8.0, 8.0)
    save(scan(None, voxels), image_path(tmp_path, "a", "M000"))
    hot = scan(None, voxels, 2)
    hot.voxels[10:12, 10:12, 10:12] = 30_000
    save(hot, image_path(tmp_path, "a", "M006"))  # they do not hide the head
    save(scan(rigid(5, 5), voxels, 1, subject=1), image_path(tmp_path, "a", "M012"))
    found = {entry["visit"]: entry["reason"] for entry in told(capsys, str(tmp_path))["suspicious"]}
    assert found["sub-a ses-M012"].startswith("perhaps another person than the visit before, or noise")
    assert len(found) == 1


def test_a_bids_folder_on_the_screen(bids, capsys):
    main(["inspect", str(bids), "--subjects", "0"])
    text = capsys.readouterr().out
    assert "5 (2 seen 1×, 3 seen 2×)" in text
    assert "0.5–1: 1, 1–1.5: 1, 3–5: 1" in text
    assert "sub-a ses-M006: the same scan as sub-a ses-M000" in text


@pytest.mark.parametrize(
    ("sides", "proposed"),
    [
        ((4.0, 4.0, 4.0), 4.0),
        ((2.04, 5.0, 3.0), 2.0),
        ((1.0, 1.2, 1.2), 1.0),
        ((0.7, 0.7, 0.7), 1.0),
        ((0.9, 5, 6), 1.0),
    ],
)
def test_the_proposal_has_voxels_as_large_as_those_of_the_data(sides, proposed):
    class Grid:
        affine = np.diag([*sides, 1.0])

    assert proposed_spacing([Grid, Grid, None]) == proposed
    assert proposed_spacing([None]) == 1


@pytest.mark.slow
def test_what_is_proposed_can_be_typed_as_it_is(tmp_path, capsys, monkeypatch):
    """Coarse images are not blown up to 1 mm, and the views of the training that follows fit into them."""
    monkeypatch.chdir(tmp_path)
    for session in ("M000", "M012"):
        save(scan(None, (4.0, 4.0, 4.0), session == "M012"), image_path(Path("bids"), "a", session))
    main(["inspect", "bids"])
    text = capsys.readouterr().out
    assert "GB of 4 mm voxels" in text
    following = text.strip().splitlines()[-1].removeprefix("Next: lssl ")
    assert following == "prepare bids bids-prepared --spacing 4"
    main(following.split())
    assert capsys.readouterr().out.strip().endswith("--data bids-prepared --views.size 32")
    main(["inspect", "bids-prepared"])
    assert capsys.readouterr().out.strip().endswith("--data bids-prepared --views.size 32")
    assert told(capsys, "bids")["prepared_spacing_mm"] == 4
    assert told(capsys, "bids", "--spacing", "2")["prepared_spacing_mm"] == 2


def test_a_prepared_folder(tmp_path, capsys):
    root, out = tmp_path / "bids", tmp_path / "out"
    path = save(scan(None, (12.0, 12.0, 12.0)), image_path(root, "a", "M000"))
    image_path(root, "b", "M000").parent.mkdir(parents=True)
    shutil.copy(path, image_path(root, "b", "M000"))
    main(["prepare", str(root), str(out), "--spacing", "12"])
    (out / "visits/sub-a/sub-a_ses-M000.b2nd").rename(tmp_path / "gone")
    capsys.readouterr()
    report = told(capsys, str(out))
    assert (report["kind"], report["subjects"], report["channels"]) == ("prepared", 2, ["T1w"])
    assert report["spacings_mm"] == {"12": 2}
    assert {"visit": "sub-b ses-M000", "reason": "the same scan as sub-a ses-M000"} in report["suspicious"]
    assert any("its file is missing" in entry["reason"] for entry in report["suspicious"])
    main(["inspect", str(out)])
    assert "on disk" in capsys.readouterr().out
    (out / "visits.csv").unlink()
    assert "its preparation was interrupted" in mistake(capsys, str(out))


def test_everything_is_read_once_and_fit_knows(tmp_path, capsys, monkeypatch):
    root = tmp_path / "bids"
    for subject in "ab":
        for session in ("M000", "M012"):
            volume = scan(None, (12.0, 12.0, 12.0), ord(subject) + len(session + subject) * (session == "M012"))
            save(volume, image_path(root, subject, session))
            place = root / f"derivatives/x/sub-{subject}/ses-{session}/anat/sub-{subject}_ses-{session}_dseg.nii.gz"
            volume.voxels = volume.foreground * 3.0
            save(volume, place)
    path = image_path(root, "a", "M012")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    labels = [root / f"derivatives/x/sub-b/ses-{s}/anat/sub-b_ses-{s}_dseg.nii.gz" for s in ("M000", "M012")]
    voxels, affine = nib.load(labels[0]).get_fdata(), nib.load(labels[0]).affine
    nib.save(nib.Nifti1Image((voxels * 0.5).astype(np.float32), affine), labels[0])
    affine[0, 3] += 5
    nib.save(nib.Nifti1Image(-voxels.astype(np.int16), affine), labels[1])
    report = told(capsys, str(root), "--subjects", "0", "--all")
    found = {entry["visit"]: [] for entry in report["suspicious"]}
    for entry in report["suspicious"]:
        found[entry["visit"]].append(entry["reason"])
    assert "cannot be read and seems damaged" in found["sub-a ses-M012"][0]
    assert "holds 1.5 and " in found["sub-b ses-M000"][0]
    assert "lies on another grid than the image, up to 5 mm off" in found["sub-b ses-M012"][0]
    assert "holds the negative value -3" in found["sub-b ses-M012"][1]
    assert report["labels"] == "4 visits of 4, 1 on another grid than the image or unreadable"
    monkeypatch.setattr(usable, "READERS", {})  # fit reads nothing again
    source = NiftiDataModule(root)
    source.setup()
    assert "1 visit that cannot be read (sub-a ses-M012: " in source.summary


def test_what_was_found_once_is_told_again_and_once(tmp_path, capsys, monkeypatch):
    """Label maps of all subjects are read, images of those asked for; a relative path names the same files."""
    root = tmp_path / "bids"
    for subject in "abc":
        volume = scan(None, (12.0, 12.0, 12.0), ord(subject))
        save(volume, image_path(root, subject, "M000"))
        volume.voxels = volume.foreground * (-1.0 if subject == "c" else 1.0)
        save(volume, root / f"derivatives/x/sub-{subject}/ses-M000/anat/sub-{subject}_ses-M000_dseg.nii.gz")
    image = nib.load(image_path(root, "b", "M000"))
    voxels = image.get_fdata()
    voxels[0, 0, 0] = np.inf
    nib.save(nib.Nifti1Image(voxels, image.affine), image_path(root, "b", "M000"))
    monkeypatch.chdir(tmp_path)
    main(["inspect", "bids", "--subjects", "1"])
    text = capsys.readouterr().out
    assert "voxels of the images of 2 subjects of 3 were not read; --all reads them" in text
    assert "sub-c ses-M000" in text
    assert "negative" in text
    assert "sub-b ses-M000" not in text
    report = told(capsys, "bids", "--all")
    assert report["not_read"] == ""
    found = sorted((entry["visit"], entry["reason"]) for entry in report["suspicious"])
    assert [visit for visit, _ in found] == ["sub-b ses-M000", "sub-c ses-M000"]
    monkeypatch.setattr(usable, "READERS", {})  # nothing more is read
    again = told(capsys, "bids", "--subjects", "0")["suspicious"]
    assert sorted((entry["visit"], entry["reason"]) for entry in again) == found


def mistake(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["inspect", *args])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_mistakes(tmp_path, capsys):
    assert "There is no folder" in mistake(capsys, str(tmp_path / "none"))
    assert "holds no sub-* folders" in mistake(capsys, str(tmp_path))
    assert "no option --jsn; did you mean '--json'?" in mistake(capsys, str(tmp_path), "--jsn")


def test_light_start(tmp_path):
    program = (
        "import sys\nfrom lssl.cli.main import main\n"
        "try:\n    main(['inspect', sys.argv[1]])\nexcept SystemExit:\n    pass\n"
        "import lssl.prepare.inspection\n"
        "print('heavy:', *{'torch', 'lightning', 'monai', 'SimpleITK', 'scipy', 'blosc2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy:"


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "mri").is_dir(), reason=f"no real MRI in {REAL}")
def test_real_scans_raise_no_false_alarm(capsys):
    report = told(capsys, str(REAL / "mri"), "--suffix", "FLAIR")
    assert report["suspicious"] == []
    assert report["pairs"]["any"] == 3
