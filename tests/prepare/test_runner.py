"""`lssl prepare` as a user runs it: whole cohorts, interruptions and changes."""

# ruff: noqa: F811

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from helpers import few
from prepared_cohort import SPACING, bids, master, prepare  # noqa: F401
from scans import image_path, rigid, save, scan

from lssl.data.store import read_stored
from lssl.prepare import runner, subject
from lssl.prepare.cohort import Options, find_subjects
from lssl.prepare.quality import ncc
from lssl.prepare.volumes import FrameGrid, resample
from lssl.utils.files import read_json


def files(out: Path) -> dict[str, bytes]:
    """What must be the same however a folder was made."""
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*.b2nd"))}
    return found | {name: (out / name).read_bytes() for name in ("visits.csv", "quality.csv")}


def test_visits_end_on_one_grid_aligned_and_listed(master):
    out = master / "out"
    table = pd.read_csv(out / "visits.csv")
    table = table.merge(pd.read_csv(out / "quality.csv"), on=["subject", "session"])
    assert table["subject"].tolist() == ["sub-a", "sub-a", "sub-b", "sub-c"]
    assert table["session"].tolist() == ["ses-M000", "ses-M012", "ses-M000", "ses-M000"]
    assert table["days"].round().tolist() == [0, 365, 0, 0]
    assert table["age"].tolist()[:2] == [61.5, 62.5]
    assert table["years_since_last"][1] == pytest.approx(1)
    assert table["years_since_last"].isna().tolist() == [True, False, True, True]
    assert table["site"].tolist()[:3] == ["north", "north", "south"]
    assert table["flags"].isna().all()
    pair = [read_stored(out / path) for path in table["image"][:2]]
    assert pair[0].shape == pair[1].shape
    np.testing.assert_array_equal(pair[0].affine, pair[1].affine)
    np.testing.assert_array_equal(pair[0].affine[:3, :3], 8 * np.eye(3))
    images = [stored.box((0, 0, 0), stored.shape)[0][0] for stored in pair]
    both = pair[0].box((0, 0, 0), pair[0].shape)[1] & pair[1].box((0, 0, 0), pair[1].shape)[1]
    assert ncc(images[0], images[1], both) > 0.8  # folds of 8 mm voxels differ a little
    assert (table["ncc_after"][:2] > table["ncc_before"][:2] + 0.05).all()
    assert table["ncc_after"].isna().tolist() == [False, False, True, True]
    for name in "abc":
        assert (out / f"pictures/sub-{name}.png").stat().st_size > 5000
    assert not list(out.rglob("*.part"))


def test_without_nonrigid_there_is_no_trace_of_it(master):
    out = master / "out"
    assert not (out / "change.tsv").exists()
    assert not list(out.rglob("*_field.npz"))
    assert "field" not in pd.read_csv(out / "quality.csv")
    assert "nonrigid" not in read_json(out / "dataset.json")["options"]  # folders of earlier versions stay finished


def test_both_visits_move_half_way(master):
    """The stored matrices take the frame to each scan; their quotient is the true motion."""
    table = pd.read_csv(master / "out/quality.csv")
    maps = [np.vstack([np.fromstring(text, sep=" ").reshape(3, 4), [0, 0, 0, 1]]) for text in table["matrix"][:2]]
    truth = rigid(3, 8, 1) @ np.linalg.inv(rigid(0, 8, 0))
    found = maps[1] @ np.linalg.inv(maps[0])
    assert np.linalg.norm((found - truth)[:3, 3]) < 1.5
    np.testing.assert_allclose(maps[0] @ maps[1], np.eye(4), atol=1e-6)
    assert table["moved_mm"][0] == pytest.approx(table["moved_mm"][1], rel=0.05)


def finished(master: Path, bids: Path, out: Path) -> Path:
    """What was made of the cohort, taken over for its copy as the message on another cohort says."""
    shutil.copytree(master / "out", out)
    known = out / "dataset.json"
    known.write_text(known.read_text().replace(str(master / "bids"), str(bids)))
    return out


def test_a_second_run_does_nothing(master, bids, tmp_path, capsys, monkeypatch):
    out = finished(master, bids, tmp_path / "out")
    before = files(out)
    monkeypatch.setattr(runner, "prepare_subject", None)
    os.utime(next(bids.rglob("*.nii.gz")))  # touched, not changed
    assert prepare(bids, out) == 0
    assert "0 prepared" in capsys.readouterr().out
    assert files(out) == before


@pytest.mark.slow
def test_shards_and_workers_make_the_same_folder(master, tmp_path):
    out = tmp_path / "out"
    assert prepare(master / "bids", out, "--shard", "2/2") == 0
    assert pd.read_csv(out / "visits.csv")["subject"].unique().tolist() == ["sub-b"]
    assert prepare(master / "bids", out, "--shard", "1/2", "--workers", "2") == 0
    assert files(out) == files(master / "out")


@pytest.mark.slow
def test_a_killed_run_is_taken_up_again(master, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lssl", "prepare", str(master / "bids"), str(out), *SPACING]
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / "records/sub-a.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (out / "records/sub-c.json").exists()
    first = (out / "records/sub-a.json").stat().st_mtime_ns
    leftover = out / "visits/sub-b/.sub-b_ses-M000.b2nd.host.1.part"
    leftover.parent.mkdir(parents=True, exist_ok=True)
    leftover.write_text("half")
    (out / "visits/sub-b/sub-b_ses-M000.b2nd").write_text("of an earlier state")  # no record vouches for it
    assert prepare(master / "bids", out) == 0
    assert files(out) == files(master / "out")
    assert (out / "records/sub-a.json").stat().st_mtime_ns == first
    assert not leftover.exists()


@pytest.mark.slow
def test_changes_redo_what_they_touch(bids, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert prepare(bids, out) == 0
    registered, prepared = [], []
    plain_register, plain_prepare = subject.register, runner.prepare_subject
    monkeypatch.setattr(subject, "register", lambda *args: registered.append(1) or plain_register(*args))
    monkeypatch.setattr(runner, "prepare_subject", lambda s, *rest: prepared.append(s.name) or plain_prepare(s, *rest))
    save(scan(rigid(5, 6), (8.0, 8.0, 8.0), subject=ord("b")), image_path(bids, "b", "M000"))
    assert prepare(bids, out) == 0
    assert (prepared, len(registered)) == (["sub-b"], 0)
    prepared.clear()
    registered.clear()
    assert prepare(bids, out, "--margin", "20") == 0
    assert (prepared, len(registered)) == (["sub-a", "sub-b", "sub-c"], 0)  # the old registration is taken
    prepared.clear()
    assert prepare(bids, out, "--margin", "20", "--transform", "affine") == 0
    assert (prepared, len(registered)) == (["sub-a", "sub-b", "sub-c"], 1)
    (out / "visits/sub-c/sub-c_ses-M000.b2nd").unlink()
    prepared.clear()
    assert prepare(bids, out, "--margin", "20", "--transform", "affine") == 0
    assert prepared == ["sub-c"]


def spoil(bids: Path, what: str) -> str:
    """Breaks the second visit of a; what the message says of it."""
    path = image_path(bids, "a", "M012")
    image = nib.load(path)
    voxels = np.asarray(image.dataobj)
    if what == "cut off":
        path.write_bytes(path.read_bytes()[:-2000])
        return "seems damaged or cut off"
    if what == "series":
        nib.save(nib.Nifti1Image(np.stack([voxels] * 2, -1), image.affine), path)
        return "but a visit is one 3D volume"
    if what == "no orientation":
        bare = nib.Nifti1Image(voxels, image.affine)
        bare.set_sform(None, 0)
        bare.set_qform(None, 0)
        nib.save(bare, path)
        return "says nothing of its orientation"
    nib.save(nib.Nifti1Image(np.full_like(voxels, 7), image.affine), path)
    return "is constant"


@pytest.mark.parametrize("what", few(["cut off", "no orientation", "series", "constant"], 1))
def test_a_broken_visit_is_named_and_the_others_are_done(what, bids, tmp_path, capsys):
    reason = spoil(bids, what)
    for _ in range(2):  # the second time from the record
        assert prepare(bids, tmp_path / "out") == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lssl: ")]
        assert len(lines) == 1
        assert lines[0].startswith("lssl: sub-a ses-M012 left out: ")
        assert reason in lines[0]
        assert "sub-a_ses-M012_T1w.nii.gz" in lines[0]
    table = pd.read_csv(tmp_path / "out/visits.csv")
    assert (table["subject"] + table["session"]).tolist() == ["sub-ases-M000", "sub-bses-M000", "sub-cses-M000"]


def test_a_visit_that_breaks_later_leaves_the_table(master, bids, tmp_path):
    finished(master, bids, tmp_path / "out")
    spoil(bids, "cut off")
    assert prepare(bids, tmp_path / "out") == 1
    assert pd.read_csv(tmp_path / "out/visits.csv")["subject"].tolist() == ["sub-a", "sub-b", "sub-c"]


def test_the_input_is_only_read(bids, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in bids.rglob("*")}
    for path in bids.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert prepare(bids, tmp_path / "out", "--shard", "3/3") == 0
        assert {path: path.stat().st_mtime_ns for path in bids.rglob("*")} == before
    finally:
        for path in bids.rglob("*"):
            path.chmod(0o755)


@pytest.mark.slow
def test_doubtful_visits_are_flagged_not_hidden(bids, tmp_path, capsys):
    """Noise, a flipped image, another person and a few hot voxels under the names of four subjects."""
    other = scan(None, (8.0, 8.0, 8.0), subject=77)
    other.voxels = np.random.default_rng(0).permutation(other.voxels.ravel()).reshape(other.voxels.shape)
    save(other, image_path(bids, "a", "M012"))
    flipped = scan(rigid(3, 5), (8.0, 8.0, 8.0), 9, subject=ord("b"))
    flipped.voxels = np.ascontiguousarray(flipped.voxels[::-1])
    save(flipped, image_path(bids, "b", "M024"))
    save(scan(rigid(3, 5), (8.0, 8.0, 8.0), 9, subject=78), image_path(bids, "c", "M012"))
    hot = scan(None, (8.0, 8.0, 8.0), subject=ord("d"))
    save(hot, image_path(bids, "d", "M000"))
    hot.voxels[10:12, 10:12, 10:12] = 30_000
    save(hot, image_path(bids, "d", "M012"))
    assert prepare(bids, tmp_path / "out") == 0
    text = capsys.readouterr().out
    print(text)
    assert "look at sub-a ses-M000: correlates by" in text
    assert re.search("look at sub-b ses-M024: .*left–right flipped against the other visits", text)
    assert re.search("look at sub-c ses-M012: .*another person", text)
    assert "look at sub-d" not in text
    assert "pictures/sub-a.png" in text
    table = pd.read_csv(tmp_path / "out/visits.csv")
    aligned = table.groupby("subject")["aligned"].any()
    assert not aligned["sub-a"]
    assert not aligned["sub-b"]
    assert aligned["sub-d"]
    assert "not aligned" in table["flags"][0]
    people = pd.read_csv(tmp_path / "out/quality.csv").set_index("subject")["same_person"]
    assert (people["sub-b"] <= -0.2).all()
    assert (people["sub-c"].abs() < 0.2).all()


def test_channels_masks_and_labels_follow_their_image(tmp_path):
    """FLAIR lies elsewhere in the scanner than T1w; mask and label lie on T1w."""
    bids, flairs = tmp_path / "bids", []
    for number, session in enumerate(["01", "02"]):
        place, slip = rigid(18 * number, 25 * number, number), rigid(6, 12, 5 + number)
        t1 = scan(place, (8.0, 8.0, 8.0), number)
        flair = scan(slip @ place, (7.0, 7.0, 9.0), 10 + number)
        flair.voxels = (flair.foreground * (420 - flair.voxels)).clip(0).astype(np.float32)
        save(t1, image_path(bids, "a", session))
        flairs.append(flair)
        save(flair, image_path(bids, "a", session, "FLAIR"))
        t1.voxels = (t1.foreground * 1.0).astype(np.float32)
        derived = bids / f"derivatives/seg/sub-a/ses-{session}/anat/sub-a_ses-{session}"
        save(t1, Path(f"{derived}_desc-brain_mask.nii.gz"), np.uint8)
        t1.voxels = t1.voxels * 41
        save(t1, Path(f"{derived}_dseg.nii.gz"), np.uint8)
    out = tmp_path / "out"
    assert prepare(bids, out, "--suffix", "T1w", "FLAIR") == 0
    visits = [read_stored(out / path) for path in pd.read_csv(out / "visits.csv")["image"]]
    for stored in visits:
        assert stored.channels == ["T1w", "FLAIR"]
        image, mask, label = stored.box((0, 0, 0), stored.shape)
        assert label is not None
        assert set(np.unique(label)) == {0, 41}
        assert ((label == 41) != mask).mean() < 0.01
    for number, matrices in enumerate(read_json(out / "records/sub-a.json")["registration"]["channels"]):
        error = np.array(matrices[1]) - rigid(6, 12, 5 + number)  # T1w → FLAIR, which slipped in the scanner
        assert np.abs(error[:3, 3]).max() < 1.5
    for number, stored in enumerate(visits):
        to_t1 = np.array(read_json(out / "records/sub-a.json")["registration"]["maps"][number])
        truth = rigid(6, 12, 5 + number) @ to_t1  # frame → T1w → FLAIR
        origin = stored.affine[:3, 3]
        grid = FrameGrid(stored.shape, 8.0, (float(origin[0]), float(origin[1]), float(origin[2])))
        image, mask, _ = stored.box((0, 0, 0), stored.shape)
        found = ncc(image[1], resample(flairs[number], grid, truth), mask)
        assert found > max(0.95, ncc(image[1], resample(flairs[number], grid, to_t1 @ rigid(6, 12, 5 + number)), mask))


def test_a_template_gives_all_subjects_one_space(bids, tmp_path):
    shutil.rmtree(bids / "sub-a")
    template = save(scan(rigid(10, 25, 3), (8.0, 8.0, 8.0), subject=ord("b")), tmp_path / "template.nii.gz")
    out = tmp_path / "out"
    assert prepare(bids, out, "--template", str(template), "--n4") == 0
    visits = [read_stored(out / path) for path in pd.read_csv(out / "visits.csv")["image"]]
    record = read_json(out / "records/sub-b.json")
    # Template b is subject b, moved: the map of template points to the scan is known.
    truth = rigid(6, 8, 2) @ np.linalg.inv(rigid(10, 25, 3))
    assert np.abs((np.array(record["registration"]["template"]) - truth)[:3, 3]).max() < 4
    for stored in visits:
        assert stored.shape == visits[0].shape
        np.testing.assert_array_equal(stored.affine, visits[0].affine)
        centre = stored.affine[:3, :3] @ stored.bounds.mean(0) + stored.affine[:3, 3]
        assert np.linalg.norm(centre - scan(rigid(10, 25, 3), (8.0, 8.0, 8.0)).centre()) < 20


def test_assembly_looks_again_when_records_come_in_meanwhile(master, monkeypatch):
    """Of two shards that end together, the later writer must not lose the other's rows."""
    options = Options(spacing=8.0)
    _, table, _ = find_subjects(master / "bids", options)
    seen = runner._records(master / "out")
    early = {name: time for name, time in seen.items() if name != "sub-c.json"}
    answers = iter([early, seen, seen, seen])
    monkeypatch.setattr(runner, "_records", lambda out: next(answers))
    assert runner.assemble(master / "out", table, options)["subject"].tolist()[-1] == "sub-c"
