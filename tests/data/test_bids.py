"""Times that a BIDS folder's tables give, as people write them; images are empty files here."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from lssl.data.bids import bids_files, bids_table
from lssl.data.pairs import order_notes, order_visits
from lssl.data.tables import csv_table
from lssl.utils.errors import InputError


def cohort(root: Path, sessions: str = "pre post", subjects: tuple[str, ...] = ("01", "02")) -> Path:
    for subject in subjects:
        for session in sessions.split():
            path = root / f"sub-{subject}/ses-{session}/anat/sub-{subject}_ses-{session}_T1w.nii.gz"
            path.parent.mkdir(parents=True)
            path.touch()
    return root


def tsv(path: Path, *lines: str, encoding: str = "utf-8", **described) -> None:
    path.write_bytes(("\n".join(line.replace(" | ", "\t") for line in lines) + "\n").encode(encoding))
    if described:
        path.with_suffix(".json").write_text(json.dumps(described))


def visits(root: Path, subject: str = "sub-01") -> tuple[list[str], list[float], list[float], list[str]]:
    """Sessions in order, times and ages of a subject, and all notes."""
    table, notes = bids_table(root, "T1w")
    table = order_visits(table)
    mine = table[table["subject"] == subject]
    return mine["session"].tolist(), mine["time"].tolist(), mine["age"].tolist(), notes + order_notes(table)


def test_dates_of_scans_tsv(tmp_path):
    cohort(tmp_path)
    for session, date in (("pre", "2015-03-02T10:00:00"), ("post", "2017-03-05T11:00:00")):
        name = f"sub-01_ses-{session}"
        tsv(
            tmp_path / f"sub-01/ses-{session}/{name}_scans.tsv",
            "filename | acq_time",
            "func/x_bold.nii.gz | 1999-01-01",
            f"anat/{name}_T1w.nii.gz | {date}",
        )
    sessions, times, _, notes = visits(tmp_path)
    assert sessions == ["ses-pre", "ses-post"]
    assert times == pytest.approx([0, 734.0417 / 365.25], abs=1e-6)
    assert len(notes) == 1
    assert notes[0].startswith("1 subject whose visits are ordered by the words of their session labels")
    assert "sub-02: ses-pre, ses-post" in notes[0]


def test_one_scans_tsv_for_all_sessions(tmp_path):
    cohort(tmp_path)
    rows = ["filename | acq_time", "ses-pre/anat/x.nii | 2015-03-02", "ses-post/anat/y.nii | 2016-03-02"]
    tsv(tmp_path / "sub-01/sub-01_scans.tsv", *rows)
    assert visits(tmp_path)[1] == pytest.approx([0, 366 / 365.25])


def test_one_unknown_date_leaves_the_words(tmp_path):
    cohort(tmp_path, "post pre")
    for session, date in (("pre", "n/a"), ("post", "2017-03-05")):
        tsv(tmp_path / f"sub-01/ses-{session}/sub-01_ses-{session}_scans.tsv", "filename | acq_time", f"a.nii | {date}")
    sessions, times, _, _ = visits(tmp_path)
    assert sessions == ["ses-pre", "ses-post"]
    assert np.isnan(times[0])


@pytest.mark.parametrize(
    ("lines", "described", "ages"),
    [
        (["participant_id | age", "sub-01 | 70"], {}, [70, 71]),
        (["Participant_ID | AGE ", " 01 |  70 "], {}, [70, 71]),
        (["participant_id | age", "1 | 72,5"], {}, [72.5, 73.5]),
        (["participant_id | age", "sub-01 | 89+"], {}, [89, 90]),
        (["participant_id | age", "sub-01 | 999"], {}, [np.nan, np.nan]),
        (["participant_id | age", "sub-01 | -4"], {}, [np.nan, np.nan]),
        (["participant_id | age", "sub-01 | 99"], {"age": {"Levels": {"99": "Not known"}}}, [np.nan, np.nan]),
        (["participant_id | age", "sub-01 | 18"], {"age": {"Units": "months"}}, [1.5, 2.5]),
        (["participant_id | Age", "sub-01 | 52.178571"], {"Age": {"Units": "weeks"}}, [1, 2]),
        (["participant_id | age_months", "sub-01 | 18"], {}, [1.5, 2.5]),
        (["participant_id | session_id | age", "sub-01 | ses-M12 | 61.2", "sub-01 | M00 | 60.1"], {}, [60.1, 61.2]),
        (["participant_id | age_M00 | age_M12", "sub-01 | 60.1 | 61.2"], {}, [60.1, 61.2]),
        (["participant_id | age_M00 | age_M12", "sub-01 | 6 | 18"], {"age_M12": {"Units": "months"}}, [0.5, 1.5]),
        (["participant_id | ses-M00_age | ses-M12_age", "sub-01 | 60.1 | 61.2"], {}, [60.1, 61.2]),
        (["participant_id | age", "sub-01 | 60", "sub-01 | 61"], {}, [np.nan, np.nan]),
        (["who | age", "sub-01 | 60"], {}, [np.nan, np.nan]),
    ],
)
def test_ages_of_participants_tsv(tmp_path, lines, described, ages):
    cohort(tmp_path, "M00 M12")
    tsv(tmp_path / "participants.tsv", *lines, **described)
    found = visits(tmp_path)[2]
    np.testing.assert_allclose(found, ages, atol=1e-4)


@pytest.mark.parametrize(
    ("lines", "described", "years"),
    [
        (
            ["session_id | acq_time", "ses-pre | 1600-03-02T10:00:00", "ses-post | 1602-03-02T10:00:00"],
            {},
            730 / 365.25,
        ),
        (["session_id | acq_time", "ses-pre | 9998-01-01", "ses-post | 9999-01-01"], {}, 365 / 365.25),
        (["session_id | acq_time", "ses-pre | 2001-01-01", "ses-post | 9999-12-31"], {}, np.nan),
        (["session_id | days", "post | 400", "pre | 35"], {}, 365 / 365.25),
        (["session_id | interval_months", "post | 6", "pre | 0"], {}, 0.5),
        (["session_id | time", "post | 26", "pre | 0"], {"time": {"Units": "weeks"}}, 26 * 7 / 365.25),
        (["Session_id | age", "post | 61.5 | x", "pre | 60"], {}, 1.5),
        (["session_id | age", "post | 90+", "pre | 89+"], {}, np.nan),
    ],
)
def test_times_of_sessions_tsv(tmp_path, lines, described, years):
    cohort(tmp_path)
    tsv(tmp_path / "sub-01/sub-01_sessions.tsv", *lines, **described)
    sessions, times, _, _ = visits(tmp_path)
    assert sessions == ["ses-pre", "ses-post"]
    np.testing.assert_allclose(times[1] - times[0], years, atol=1e-9)


def test_units_of_all_sessions_stand_beside_the_subjects(tmp_path):
    cohort(tmp_path)
    tsv(tmp_path / "sub-01/sub-01_sessions.tsv", "session_id | age", "pre | 6", "post | 18")
    (tmp_path / "sessions.json").write_text(json.dumps({"age": {"Units": "months"}}))
    assert visits(tmp_path)[1:3] == ([0, pytest.approx(1)], [0.5, pytest.approx(1.5)])


def test_weeks_are_waves_where_dates_say_so(tmp_path):
    cohort(tmp_path, "w1 w2 w3", ("01", "02"))
    assert visits(tmp_path)[1] == pytest.approx([0, 7 / 365.25, 14 / 365.25])
    dates = [f"w{number} | {2010 + number}-01-01" for number in (1, 2, 3)]
    tsv(tmp_path / "sub-01/sub-01_sessions.tsv", "session_id | acq_time", *dates)
    assert visits(tmp_path)[1] == pytest.approx([0, 1, 2], abs=0.01)
    sessions, times, _, notes = visits(tmp_path, "sub-02")  # of whom nothing is known but what the others' labels mean
    assert sessions == ["ses-w1", "ses-w2", "ses-w3"]
    assert np.isnan(times).all()
    assert any("session labels such as w1 are numbers, not units of time" in note for note in notes)
    assert any("ordered by the number in their session label" in note for note in notes)


def test_sources_that_disagree_are_reported_with_both_values(tmp_path):
    cohort(tmp_path, "M00 M12")
    tsv(tmp_path / "sub-01/sub-01_sessions.tsv", "session_id | acq_time", "M00 | 2010-01-01", "M12 | 2013-01-01")
    _, times, _, notes = visits(tmp_path)
    assert times == pytest.approx([0, 3], abs=0.01)
    assert notes == [
        "1 contradiction between sources of time: sub-01 ses-M12 is 3.00 years after ses-M00 by the date (taken), "
        "1.00 by the session label"
    ]
    tsv(tmp_path / "sub-01/sub-01_sessions.tsv", "session_id | acq_time", "M00 | 2010-01-01", "M12 | 2011-03-01")
    assert visits(tmp_path)[3] == []  # fourteen months are twelve, as visits are planned


def test_dates_against_the_words_of_labels_are_reported(tmp_path):
    cohort(tmp_path)
    tsv(tmp_path / "sub-01/sub-01_sessions.tsv", "session_id | acq_time", "pre | 2011-01-01", "post | 2010-01-01")
    sessions, _, _, notes = visits(tmp_path)
    assert sessions == ["ses-post", "ses-pre"]
    assert notes[0].endswith("sub-01: ses-post is 1.00 years before ses-pre by time (taken), after it by label")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-16-le", "utf-16-be"])
def test_any_encoding(tmp_path, encoding):
    cohort(tmp_path, "M00 M12")
    lines = ["participant_id | age | site", "sub-01 | 72 | Zürich", "sub-02 | 70 | Köln"]
    tsv(tmp_path / "participants.tsv", *lines, encoding=encoding)
    table, notes = bids_table(tmp_path, "T1w")
    assert table["site"].tolist() == ["Zürich"] * 2 + ["Köln"] * 2
    assert table["age"].tolist() == pytest.approx([72, 73, 70, 71])
    assert notes == []


def test_a_broken_sidecar_is_noted(tmp_path):
    cohort(tmp_path)
    tsv(tmp_path / "participants.tsv", "participant_id | age", "sub-01 | 60")
    (tmp_path / "participants.json").write_text('{"age": ')
    assert any("participants.json is no JSON and is not read" in note for note in visits(tmp_path)[3])


def test_random_bytes_end_in_a_table_or_one_sentence(tmp_path):
    draw = random.Random(5)
    cohort(tmp_path)
    pieces = [
        b"\t",
        b"\n",
        b"\r\n",
        b",",
        b'"',
        b"sub-01",
        b"ses-pre",
        b"participant_id",
        b"session_id",
        b"age",
        b"date",
    ]
    pieces += [
        b"acq_time",
        b"subject",
        b"session",
        b"image",
        b"89+",
        b"-4",
        b"\xff\xfe",
        b"\0",
        b"\xe9",
        b"1e999",
        b"7-3",
    ]
    pieces += [
        "٣".encode(),
        b"9999-99-99",
        b"{",
        b"nan",
        b"inf",
        b" ",
        b"2015-03-02T25:00:00",
        b"\xef\xbb\xbf",
        b"days",
    ]
    outcomes = set()
    for _ in range(60):  # `make fuzz` tries more
        content = b"".join(draw.choices(pieces, k=draw.randrange(40)))
        content = (
            draw.choice([b"", b"participant_id\tage\n", b"session_id\tage\tdays\n", b"subject,session,image,age\n"])
            + content
        )
        for name in ("participants.tsv", "sub-01/sub-01_sessions.tsv", "participants.json", "visits.csv"):
            (tmp_path / name).write_bytes(content)
        for read in (lambda: bids_table(tmp_path, "T1w"), lambda: csv_table(tmp_path / "visits.csv")):
            try:
                table, _ = read()
                outcomes.add("table")
                assert not (table["age"] > 130).any()
            except InputError:
                outcomes.add("sentence")
    assert outcomes == {"table", "sentence"}


# --- choosing files ---------------------------------------------------------------------------------------------------


def images(root: Path, *names: str) -> Path:
    for name in names:
        session = name.split("_")[0]
        path = root / f"sub-01/ses-{session}/anat/sub-01_ses-{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def taken(root: Path, select: str = "", suffix: str = "T1w") -> list[str]:
    files, _ = bids_files(root, suffix, select)
    assert (files["taken"] | (files["why"] != "")).all()
    return [Path(name).name[len("sub-01_ses-") : -len(".nii.gz")] for name in files["file"][files["taken"]]]


def test_runs_reconstructions_and_spaces(tmp_path):
    images(tmp_path, "1_T1w", "2_run-01_T1w", "2_run-02_T1w", "3_T1w", "3_rec-norm_T1w", "4_T1w", "4_space-MNI_T1w")
    assert taken(tmp_path) == ["1_T1w", "2_run-02_T1w", "3_T1w", "4_T1w"]
    assert taken(tmp_path, "run=first rec=norm") == ["1_T1w", "2_run-01_T1w", "3_rec-norm_T1w", "4_T1w"]
    assert taken(tmp_path, "run=2") == ["1_T1w", "2_run-02_T1w", "3_T1w", "4_T1w"]
    assert taken(tmp_path, "space=MNI") == ["4_space-MNI_T1w"]
    assert taken(tmp_path, "space=MNI,native run=last") == ["1_T1w", "2_run-02_T1w", "3_T1w", "4_space-MNI_T1w"]
    assert taken(tmp_path, suffix="run-01_T1w") == ["2_run-01_T1w"]


def test_of_several_acquisitions_the_common_one_is_taken_and_said(tmp_path):
    images(tmp_path, "1_acq-a_T1w", "1_acq-b_T1w", "2_acq-b_T1w", "3_acq-b_T1w")
    assert taken(tmp_path) == ["1_acq-b_T1w", "2_acq-b_T1w", "3_acq-b_T1w"]
    files, notes = bids_files(tmp_path, "T1w")
    assert notes == ["1 visit with several images, of which acq-b is taken (select acq=… to choose)"]
    assert files["why"].tolist() == ["acq-b is taken, the default", "", "", ""]
    assert taken(tmp_path, "acq=a,b") == ["1_acq-a_T1w", "2_acq-b_T1w", "3_acq-b_T1w"]
    files, notes = bids_files(tmp_path, "T1w", "acq=a")
    assert notes == ["2 visits whose T1w images are all left out", "3 images left out (acq=a)"]


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ("run", "select has 'run'; write entity=value"),
        ("run=", "select has 'run='; write entity=value"),
        ("sub=01", "select has 'sub=01'"),
        ("run=1 run=2", "select names run twice"),
        ("acq=z", r"All T1w images of .* are left out \(acq=z\); choose others with select"),
    ],
)
def test_bad_selections(tmp_path, select, message):
    images(tmp_path, "1_acq-a_T1w")
    with pytest.raises(InputError, match=message):
        bids_files(tmp_path, "T1w", select)
