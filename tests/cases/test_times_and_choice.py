"""Complaints of people with real cohorts: order, ages, encodings, repeated scans, dates, intervals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from lssl.cli.main import main
from lssl.data.pairs import order_visits
from lssl.datamodules.nifti import NiftiDataModule
from lssl.utils.errors import InputError
from lssl.utils.intervals import interval_weight

SHAPE = (14, 16, 12)


def head(seed: int, change: float = 0.0) -> np.ndarray:
    """A bright ellipsoid with a hollow that grows."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"), -1)
    radius = np.linalg.norm(grid, axis=-1)
    image = np.where(radius < 0.8, 600.0, 0.0) * (radius > 0.2 + change)
    return (image + 20 * np.random.default_rng(seed).random(SHAPE)).astype(np.int16)


def bids(root: Path, sessions: str, subjects: int = 3) -> Path:
    """A tree with small images."""
    for number in range(1, subjects + 1):
        for order, session in enumerate(sessions.split()):
            path = root / f"sub-{number:02}/ses-{session}/anat/sub-{number:02}_ses-{session}_T1w.nii.gz"
            path.parent.mkdir(parents=True)
            nib.save(nib.Nifti1Image(head(number, 0.05 * order), np.diag([8.0, 8, 8, 1])), path)
    return root


def loaded(root: Path | None = None, **options) -> NiftiDataModule:
    source = NiftiDataModule(root, **options)
    source.setup()
    return source


@pytest.mark.parametrize(
    ("sessions", "first"),
    [
        ("2YearFollowUpYArm1 4YearFollowUpYArm1 baselineYear1Arm1", "baselineYear1Arm1"),
        ("post pre", "pre"),
        ("retest test", "test"),
        ("M06 M12 bl", "bl"),
        ("m06 m12 sc", "sc"),
        ("b a", None),
    ],
)
def test_the_first_visit_is_the_first_or_refused(tmp_path, sessions, first):
    bids(tmp_path, sessions)
    if first is None:
        with pytest.raises(InputError, match="pairs is baseline, which needs the order of visits"):
            loaded(tmp_path, pairs="baseline")
        assert "3 subjects whose visits have no known order" in loaded(tmp_path).summary
        return
    source = loaded(tmp_path, pairs="baseline")
    for subject, visits in source.table.groupby("subject"):
        assert visits["session"].iat[0] == f"ses-{first}", subject
    assert set(source.table["session"].iloc[source.train_pairs[:, 0]]) == {f"ses-{first}"}


def test_one_age_of_89_plus_refuses_nobody(tmp_path, capsys):
    bids(tmp_path, "M000 M012")
    lines = ["participant_id\tage\tsex", "sub-01\t72\tF", "sub-02\t89+\tM", "sub-03\t65\tF"]
    (tmp_path / "participants.tsv").write_text("\n".join(lines) + "\n")
    main(["inspect", str(tmp_path), "--subjects", "0", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["subjects"], report["without_age"]) == (3, 0)
    assert any("sub-02 ses-M000: age_at_baseline in participants.tsv is 89+" in text for text in report["left_out"])


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_sites_with_umlauts_in_any_encoding(tmp_path, encoding):
    bids(tmp_path, "M000 M012")
    lines = ["participant_id\tage\tsite", "sub-01\t72\tZürich", "sub-02\t70\tKöln", "sub-03\t61\tGraz"]
    (tmp_path / "participants.tsv").write_bytes(("\n".join(lines) + "\n").encode(encoding))
    assert sorted(set(loaded(tmp_path).table["site"])) == ["Graz", "Köln", "Zürich"]


def test_shifted_dates_before_1677(tmp_path):
    bids(tmp_path, "1 2")
    for number in (1, 2, 3):
        lines = ["session_id\tacq_time", "ses-1\t1600-03-02T10:00:00", "ses-2\t1602-03-05T11:00:00"]
        (tmp_path / f"sub-{number:02}/sub-{number:02}_sessions.tsv").write_text("\n".join(lines) + "\n")
    assert loaded(tmp_path).table["time"].tolist() == pytest.approx([0, 733.0417 / 365.25] * 3, abs=1e-4)


def test_dates_in_scans_tsv_alone(tmp_path):
    bids(tmp_path, "pre post")
    for number in (1, 2, 3):
        for session, date in (("pre", "2015-03-02T10:00:00"), ("post", "2017-03-05T11:00:00")):
            name = f"sub-{number:02}_ses-{session}"
            text = f"filename\tacq_time\nanat/{name}_T1w.nii.gz\t{date}\n"
            (tmp_path / f"sub-{number:02}/ses-{session}/{name}_scans.tsv").write_text(text)
    table = loaded(tmp_path).table.query("subject == 'sub-01'")
    assert table["session"].tolist() == ["ses-pre", "ses-post"]
    assert table["time"].iat[1] == pytest.approx(2.01, abs=0.005)


def test_one_session_with_two_runs_keeps_the_cohort_whole(tmp_path, capsys):
    root = bids(tmp_path / "in", "01 02")
    folder = root / "sub-02/ses-02/anat"
    plain = folder / "sub-02_ses-02_T1w.nii.gz"
    shutil.copy(plain, folder / "sub-02_ses-02_run-02_T1w.nii.gz")
    plain.rename(folder / "sub-02_ses-02_run-01_T1w.nii.gz")
    assert len(loaded(root).table) == 6
    main(["prepare", str(root), str(tmp_path / "out"), "--select", "run=first", "--list"])
    listed = capsys.readouterr().out
    assert "left   sub-02/ses-02/anat/sub-02_ses-02_run-02_T1w.nii.gz  (run=first)" in listed
    assert "T1w: 6 of 7 images taken" in listed
    assert not (tmp_path / "out").exists()


def test_prepare_takes_a_table(tmp_path):
    root = bids(tmp_path / "in", "pre post", subjects=1)
    rows = [("p1", "b", "post"), ("p1", "a", "pre")]
    table = pd.DataFrame(rows, columns=["subject", "session", "image"])
    table["image"] = [f"sub-01/ses-{name}/anat/sub-01_ses-{name}_T1w.nii.gz" for name in table["image"]]
    table.assign(days=[400, 35]).to_csv(root / "visits.csv", index=False)
    from lssl.prepare.cohort import Options, find_subjects

    (subject,), found, notes = find_subjects(root / "visits.csv", Options())
    assert (subject.name, [session.name for session in subject.sessions]) == ("p1", ["a", "b"])
    assert found["time"].tolist() == pytest.approx([0, 365 / 365.25])
    assert notes == []
    with pytest.raises(InputError, match="is a table, which names the images of a visit"):
        find_subjects(root / "visits.csv", Options(select="run=1"))


def test_days_without_ages_weigh_pairs_and_order_them(tmp_path):
    bids(tmp_path, "x y", subjects=4)
    rows = [
        (f"s{number}", session, f"sub-{number:02}/ses-{session}/anat/sub-{number:02}_ses-{session}_T1w.nii.gz", days)
        for number in (1, 2, 3, 4)
        for session, days in (("x", 365.25), ("y", 0))
    ]
    pd.DataFrame(rows, columns=["subject", "session", "image", "days"]).to_csv(tmp_path / "visits.csv", index=False)
    batch = next(iter(loaded(table=tmp_path / "visits.csv", batch_size=2).train_dataloader()))
    assert batch.ages.isnan().all()
    assert batch.times.tolist() == [[0, 1]] * 2
    assert interval_weight(*batch.times.T, tau=0.5).tolist() == pytest.approx([np.exp(-2)] * 2)


def test_blanks_around_an_id_make_no_second_person(tmp_path):
    bids(tmp_path, "1 2", subjects=1)
    lines = ["subject,session,image"]
    lines += [
        f"{name},{n},sub-01/ses-{n}/anat/sub-01_ses-{n}_T1w.nii.gz" for name, n in ((" sub-000 ", 1), ("sub-000", 2))
    ]
    (tmp_path / "visits.csv").write_text("\n".join(lines) + "\n")
    assert loaded(table=tmp_path / "visits.csv").subjects == ["sub-000"]
    assert order_visits(loaded(table=tmp_path / "visits.csv").table)["subject"].nunique() == 1
