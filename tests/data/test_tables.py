"""Visit tables from BIDS folders and CSVs; files are empty here, as only their names matter."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from lssl.data.bids import bids_table
from lssl.data.labels import label_time
from lssl.data.tables import csv_table
from lssl.utils.errors import InputError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def bids(root: Path, **visits) -> Path:
    """A BIDS folder from subject=[sessions], each with a T1w."""
    for subject, sessions in visits.items():
        for session in sessions:
            touch(root, f"sub-{subject}/ses-{session}/anat/sub-{subject}_ses-{session}_T1w.nii.gz")
    return root


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_bids_folders_with_and_without_sessions(tmp_path):
    bids(tmp_path, a=["01", "02"])
    touch(tmp_path, "sub-b/anat/sub-b_T1w.nii", "sub-b/anat/._sub-b_T1w.nii", "sub-b/anat/sub-b_T1w.json")
    touch(tmp_path, "sub-c/ses-01/anat/sub-c_ses-01_T2w.nii.gz", "sub-d/ses-01/dwi/sub-d_ses-01_dwi.nii.gz")
    table, left_out = bids_table(tmp_path, "T1w")
    assert table["subject"].tolist() == ["sub-a", "sub-a", "sub-b"]
    assert table["session"].tolist() == ["ses-01", "ses-02", ""]
    assert table["image"].iat[2] == str(tmp_path / "sub-b/anat/sub-b_T1w.nii")
    assert (table[["mask", "label"]] == "").all(axis=None)
    assert left_out == ["2 visits without a T1w image"]


def test_contrast_images_are_left_out_unless_asked_for(tmp_path):
    bids(tmp_path, a=["01"])
    touch(tmp_path, "sub-a/ses-01/anat/sub-a_ses-01_ce-gad_T1w.nii.gz")
    table, left_out = bids_table(tmp_path, "T1w")
    assert table["image"].str.endswith("ses-01_T1w.nii.gz").all()
    assert left_out == ["1 image with contrast agent (ce-)"]
    table, left_out = bids_table(tmp_path, "ce-gad_T1w")
    assert table["image"].str.endswith("ce-gad_T1w.nii.gz").all()
    assert left_out == []


def test_of_several_runs_the_last_is_taken_and_said_until_the_suffix_says_which(tmp_path):
    touch(tmp_path, *(f"sub-a/ses-01/anat/sub-a_ses-01_run-{run}_T1w.nii.gz" for run in (1, 2, 10)))
    table, notes = bids_table(tmp_path, "T1w")
    assert table["image"].str.endswith("run-10_T1w.nii.gz").tolist() == [True]
    assert notes == ["1 visit with several images, of which run-10 is taken (select run=… to choose)"]
    assert bids_table(tmp_path, "run-2_T1w")[0]["image"].str.endswith("run-2_T1w.nii.gz").tolist() == [True]


def test_missing_folder_and_missing_suffix(tmp_path):
    with pytest.raises(InputError, match=r"folder .*nowhere does not exist"):
        bids_table(tmp_path / "nowhere", "T1w")
    with pytest.raises(InputError, match=r"holds no sub-\* folders"):
        bids_table(tmp_path, "T1w")
    bids(tmp_path, a=["01", "02"])
    touch(tmp_path, "sub-a/ses-01/anat/sub-a_ses-01_FLAIR.nii.gz")
    with pytest.raises(InputError, match=r"anat/\*_T2w.nii\[.gz\]; the suffixes there are: FLAIR \(1\), T1w \(2\)"):
        bids_table(tmp_path, "T2w")


@pytest.mark.parametrize(
    ("text", "time", "age"),
    [
        ("session_id\tdays_since_baseline\tage\nses-01\t0\t70.00\nses-02\t203\tn/a\n", 203 / 365.25, 70 + 203 / 365.25),
        ("session_id\tage\n01\t70.5\n02\t71.75\n", 1.25, 71.75),
        ("session_id\tacq_time\nses-01\t2009-06-15T13:45:30\nses-02\t2010-06-15T13:45:30\n", 365 / 365.25, np.nan),
        ("session_id\tdays\tage\nses-01\tn/a\t60\nses-02\t30\t61\n", 1, 61),  # days are not complete
        ("session_id\tage\nses-01\tn/a\nses-02\tn/a\n", np.nan, np.nan),
    ],
)
def test_times_from_sessions_tsv(tmp_path, text, time, age):
    bids(tmp_path, a=["01", "02"])
    (tmp_path / "sub-a/sub-a_sessions.tsv").write_text(text)
    table, _ = bids_table(tmp_path, "T1w")
    np.testing.assert_allclose(table["time"].iat[1], time)
    np.testing.assert_allclose(table["age"].iat[1], age)


def test_times_from_session_labels(tmp_path):
    bids(tmp_path, oas=["d0129", "d0860"], adni=["M000", "M024"], other=["01", "02"])
    table, _ = bids_table(tmp_path, "T1w")
    time = table.set_index(["subject", "session"])["time"]
    assert time["sub-oas", "ses-d0860"] == pytest.approx(731 / 365.25)
    assert time["sub-adni", "ses-M024"] == pytest.approx(2)
    assert time["sub-other"].isna().all()
    years = [label_time(label).years for label in ("ses-d0129", "M012", "y2")]
    assert years == pytest.approx([129 / 365.25, 1, 2])
    assert np.isnan([label_time(label).years for label in ("ses-01", "ses-MR1", "ses-d", "")]).all()


def test_labels_go_before_ages_in_whole_years_only(tmp_path):
    bids(tmp_path, a=["d0000", "d0400"])
    path = tmp_path / "sub-a/sub-a_sessions.tsv"
    path.write_text("session_id\tage\nses-d0000\t70\nses-d0400\t71\n")
    assert bids_table(tmp_path, "T1w")[0]["time"].iat[1] == pytest.approx(400 / 365.25)
    path.write_text("session_id\tage\nses-d0000\t70.2\nses-d0400\t71.3\n")
    assert bids_table(tmp_path, "T1w")[0]["time"].iat[1] == pytest.approx(1.1)


def test_participants_give_the_age_at_baseline(tmp_path):
    bids(tmp_path, a=["d0000", "d0731"], b=["01"], c=["01"])
    (tmp_path / "participants.tsv").write_text("participant_id\tage\tsex\nsub-a\t70\tF\nb\t33.5\tM\nsub-c\tn/a\tF\n")
    table, _ = bids_table(tmp_path, "T1w")
    np.testing.assert_allclose(table["age"], [70, 70 + 731 / 365.25, 33.5, np.nan])
    assert table["time"].iat[2] == 0  # the only visit is the first


def test_masks_and_labels_by_pattern(tmp_path):
    bids(tmp_path, a=["01", "02"], b=["01"])
    touch(tmp_path, "derivatives/masks/sub-a/anat/sub-a_desc-brain_mask.nii.gz")
    touch(tmp_path, "derivatives/seg/sub-a/ses-02/anat/sub-a_ses-02_space-x_dseg.nii.gz")
    masks = "derivatives/masks/{subject}/anat/{subject}_desc-brain_mask.nii.gz"
    labels = "derivatives/**/{subject}_{session}_*dseg.nii*"
    table, _ = bids_table(tmp_path, "T1w", masks, labels)
    mask = str(tmp_path / "derivatives/masks/sub-a/anat/sub-a_desc-brain_mask.nii.gz")
    assert table["mask"].tolist() == [mask, mask, ""]
    assert [bool(path) for path in table["label"]] == [False, True, False]
    with pytest.raises(InputError, match=r"No file .* matches masks='x/\{subject\}.nii' \(looked for x/sub-a.nii"):
        bids_table(tmp_path, "T1w", "x/{subject}.nii")
    with pytest.raises(InputError, match="other placeholders than"):
        bids_table(tmp_path, "T1w", "x/{sub}.nii")
    touch(tmp_path, "derivatives/masks/sub-a/anat/sub-a_desc-head_mask.nii.gz")
    with pytest.raises(InputError, match=r"matches 2 files for sub-a ses-01 .*desc-brain.*desc-head"):
        bids_table(tmp_path, "T1w", "derivatives/masks/{subject}/anat/*_mask.nii.gz")


def test_a_csv_with_all_columns(tmp_path):
    path = write_csv(
        tmp_path / "visits.csv",
        "Subject,session,image,days,mask,label,site,split\n"
        "s1,v1,s1/v1.nii.gz,0,m/1.nii.gz,,A,Train\n"
        "s1,v2,s1/v2.nii.gz,365.25,,l/2.nii.gz,B,train\n"
        "007,v1,/abs/x.nii.gz,n/a,,,A,test\n",
    )
    table, notes = csv_table(path)
    assert notes == []
    assert table["image"].tolist() == [str(tmp_path / "s1/v1.nii.gz"), str(tmp_path / "s1/v2.nii.gz"), "/abs/x.nii.gz"]
    assert table["mask"].tolist() == [str(tmp_path / "m/1.nii.gz"), "", ""]
    assert table["subject"].iat[2] == "007"
    assert table["time"].tolist() == [0, 1, 0]
    assert table["split"].tolist() == ["train", "train", "test"]
    assert csv_table(path, "/data")[0]["image"].iat[0] == "/data/s1/v1.nii.gz"


def test_a_csv_with_dates_and_ages(tmp_path):
    lines = "subject,session,image,date,age\na,1,1.nii,2020-01-01,60\na,2,2.nii,2021-01-01,\n"
    table, _ = csv_table(write_csv(tmp_path / "visits.csv", lines))
    assert table["time"].iat[1] == pytest.approx(366 / 365.25)
    assert table["age"].iat[1] == pytest.approx(60 + 366 / 365.25)
    tabs = write_csv(tmp_path / "visits.tsv", "subject\tsession\timage\na\t1\t1.nii\n")
    assert csv_table(tabs)[0]["time"].tolist() == [0]


HEAD = "subject,session,image"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("subject,scan,days\na,b,0\n", "lacks the columns session, image; it has subject, scan, days"),
        (f"{HEAD}\na,1,\n", "Line 2 of .* has no image"),
        (f"{HEAD}\na,1,x.nii\na,2,x.nii\n", "Duplicate visit: lines 2 and 3 of .* name the same image"),
        ("", "cannot be read .* write it as a CSV with a header line"),
        (f"{HEAD}\na,1,1.nii\na,2,2.nii,x,y\n", "cannot be read"),
    ],
)
def test_bad_csvs_are_refused(tmp_path, text, message):
    path = write_csv(tmp_path / "visits.csv", text)
    with pytest.raises(InputError, match=message):
        csv_table(path)


@pytest.mark.parametrize(
    ("cells", "age", "note"),
    [
        ("days\n-5", np.nan, "days in visits.csv is -5: not between 0 and 130 years, so unknown"),
        ("days\nsoon", np.nan, "days in visits.csv is soon: no number, so unknown"),
        ("age\n-4", np.nan, "age in visits.csv is -4: not between 0 and 130 years, so unknown"),
        ("age\n25000", np.nan, "age in visits.csv is 25000: not between 0 and 130 years, so unknown"),
        ("age\n89+", 89, r"age in visits.csv is 89\+: taken as 89 years, and no interval rests on it"),
        ("age\n>89", 89, "age in visits.csv is >89: taken as 89 years"),
        ("age\n70-74", 72, "age in visits.csv is 70-74: taken as 72 years"),
        ('age\n"72,5"', 72.5, ""),
        ("age_months\n18", 1.5, ""),
        ("AGE (days)\n730.5", 2, ""),
        ("age\n072Y", 72, ""),
        ("date\n31.12.2020", np.nan, ""),
        ("date\n12/31/2020", np.nan, "date in visits.csv is 12/31/2020: no date such as"),
        ("age\nn/a", np.nan, ""),
    ],
)
def test_an_odd_cell_is_listed_and_refuses_no_cohort(tmp_path, cells, age, note):
    column, cell = cells.split("\n")
    path = write_csv(tmp_path / "visits.csv", f"{HEAD},{column}\na,1,1.nii,{cell}\nb,1,2.nii,\n")
    table, notes = csv_table(path)
    np.testing.assert_allclose(table["age"], [age, np.nan])
    assert bool(notes) == bool(note)
    if note:
        assert re.fullmatch(f"1 value odd: a 1: {note}.*", notes[0])


def test_contradictions_are_reported_with_both_values(tmp_path):
    path = write_csv(tmp_path / "visits.csv", f"{HEAD},days,age\na,1,1.nii,0,60\na,2,2.nii,100,70\nb,1,3.nii,0,5\n")
    table, notes = csv_table(path)
    assert table["time"].tolist() == pytest.approx([0, 100 / 365.25, 0])
    assert notes == [
        "1 contradiction between sources of time: a 2 is 0.27 years after 1 by the time since the baseline (taken), "
        "10.00 by the age in whole years"
    ]


def test_blanks_around_cells_make_no_other_person(tmp_path):
    text = " Subject , session,image\n sub-000 ,1,1.nii\nsub-000, 2 , 2.nii\n,3,3.nii\n000,1,4.nii\n"
    table, notes = csv_table(write_csv(tmp_path / "visits.csv", text))
    assert table["subject"].tolist() == ["sub-000", "sub-000", "000"]
    assert table["session"].tolist() == ["1", "2", "1"]
    assert table["image"].iat[1] == str(tmp_path / "2.nii")
    assert notes == [
        "1 line of visits.csv without subject, the first being 4",
        "subjects 000 and sub-000 may be one person; they are taken as two",
    ]


def test_one_path_spelled_twice_is_a_duplicate(tmp_path):
    text = f"{HEAD}\na,1,x/../a.nii\nb,1,./a.nii\n"
    with pytest.raises(InputError, match=r"lines 2 and 3 of .* name the same image"):
        csv_table(write_csv(tmp_path / "visits.csv", text))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_any_encoding_and_line_end(tmp_path, encoding, end):
    lines = ["subject,session,image,site,age", "a,1,1.nii,Zürich,70", "b,1,2.nii,Köln,71"]
    (tmp_path / "visits.csv").write_bytes((end.join(lines) + end).encode(encoding))
    table, notes = csv_table(tmp_path / "visits.csv")
    assert table["site"].tolist() == ["Zürich", "Köln"]
    assert table["age"].tolist() == [70, 71]
    assert notes == []


def test_a_missing_csv(tmp_path):
    with pytest.raises(InputError, match=r"table .*none.csv does not exist"):
        csv_table(tmp_path / "none.csv")
