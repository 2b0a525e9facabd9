"""What stops `lssl prepare`, in one sentence, and what it leaves out."""

# ruff: noqa: F811

from __future__ import annotations

import errno
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pandas as pd
import pytest
from prepared_cohort import bids, make_cohort, master, prepare  # noqa: F401
from scans import image_path, save, scan

from lssl.cli.main import main
from lssl.prepare import runner
from lssl.prepare.cohort import Options, find_subjects


def test_a_subject_without_a_usable_visit_fails(bids, tmp_path, capsys):
    image_path(bids, "b", "M000").unlink()
    image_path(bids, "b", "M000").symlink_to("../gone.nii.gz")
    assert prepare(bids, tmp_path / "out") == 1
    assert "lssl: sub-b failed: " in capsys.readouterr().err
    assert pd.read_csv(tmp_path / "out/visits.csv")["subject"].tolist() == ["sub-a", "sub-a", "sub-c"]


def test_a_full_disk_stops_the_run_and_keeps_what_is_finished(bids, tmp_path, monkeypatch, capsys):
    plain = runner.prepare_subject

    def full(one, *rest):
        if one.name == "sub-b":
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(one, *rest)

    monkeypatch.setattr(runner, "prepare_subject", full)
    assert prepare(bids, tmp_path / "out") == 2
    assert "The disk of" in capsys.readouterr().err
    assert pd.read_csv(tmp_path / "out/visits.csv")["subject"].unique().tolist() == ["sub-a"]


def test_visits_without_a_suffix_or_a_time_are_counted(tmp_path):
    bids = tmp_path / "bids"
    for session in ("one", "two"):
        save(scan(None, (16.0, 16.0, 16.0)), image_path(bids, "a", session))
    save(scan(None, (16.0, 16.0, 16.0)), image_path(bids, "a", "one", "FLAIR"))
    subjects, table, notes = find_subjects(bids, Options(suffixes=("T1w", "FLAIR")))
    assert [session.name for session in subjects[0].sessions] == ["ses-one"]
    assert len(table) == 1
    assert "1 visit with T1w but without FLAIR (sub-a ses-two)" in notes
    _, _, notes = find_subjects(bids, Options())
    assert "2 visits without a time (no date, age, or label such as ses-M012)" in notes


def sentence(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["prepare", *args])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lssl: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_mistakes_end_in_one_sentence(master, tmp_path, capsys):
    bids, out = str(master / "bids"), str(tmp_path / "new")
    assert "does not exist; give the BIDS folder" in sentence(capsys, str(tmp_path / "none"), out)
    assert "matches sub-*/[ses-*]/anat/*_T9w" in sentence(capsys, bids, out, "--suffix", "T9w")
    assert "no option --sufix; did you mean '--suffix'?" in sentence(capsys, bids, out, "--sufix", "T1w")
    assert "1 ≤ i ≤ n" in sentence(capsys, bids, out, "--shard", "3/2")
    assert "it must be positive" in sentence(capsys, bids, out, "--spacing", "0")
    assert "The template no.nii does not exist" in sentence(capsys, bids, out, "--template", "no.nii")
    assert "name every suffix once" in sentence(capsys, bids, out, "--suffix", "T1w", "T1w")
    assert not Path(out).exists()


def test_folders_of_others_are_refused(master, tmp_path, capsys):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    assert "not empty and holds no prepared visits" in sentence(capsys, str(master / "bids"), str(foreign))
    other = make_cohort(tmp_path / "other")
    assert "holds the visits of another cohort" in sentence(capsys, str(other), str(master / "out"))
    assert "is a file" in sentence(capsys, str(other), str(foreign / "thesis.txt"))


def test_a_folder_that_cannot_be_written_is_refused(master, tmp_path, monkeypatch, capsys):
    def refuse(path, content):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(runner, "write_json", refuse)
    text = sentence(capsys, str(master / "bids"), str(tmp_path / "locked"))
    assert "Nothing can be written to" in text
    assert "(Permission denied); name another folder" in text


def test_a_worker_that_dies_is_reported(master, tmp_path, monkeypatch, capsys):
    """As the system does to a process that takes too much memory."""

    class Broken:
        def __init__(self, *_, **__): ...

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def submit(self, *_):
            raise BrokenProcessPool

        def shutdown(self, **_): ...

    monkeypatch.setattr(runner, "ProcessPoolExecutor", Broken)
    text = sentence(capsys, str(master / "bids"), str(tmp_path / "out"), "--workers", "2")
    assert "A worker was killed" in text
    assert "fewer --workers" in text


def test_light_start():
    """Help and mistakes need none of the libraries that the work needs."""
    program = (
        "import sys\nfrom lssl.cli.main import main\n"
        "try:\n    main(['prepare', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('heavy:', *{'torch', 'lightning', 'monai', 'SimpleITK', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--shard" in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy:"
