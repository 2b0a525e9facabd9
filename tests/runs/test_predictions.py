"""Folders of predictions: equal names of subjects never meet."""

import json

import pandas as pd
import pytest

from lssl.runs.predictions import prediction_folder

TABLE = pd.DataFrame({"subject": ["sub-01"], "session": ["ses-1"], "age": [50.0], "time": [float("nan")]})


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "best.ckpt"
    path.write_bytes(b"weights")
    return path


def test_cohorts_and_weights_have_folders_of_their_own(tmp_path, weights):
    run = tmp_path / "run"
    for place in ("a/cohort", "b/cohort"):
        (tmp_path / place).mkdir(parents=True)
    first = prediction_folder(run, str(tmp_path / "a/cohort"), TABLE, str(weights))
    assert first == run / "predict" / "cohort"
    (first / "volumes.csv").write_text("x")
    assert prediction_folder(run, str(tmp_path / "a/cohort/"), TABLE, str(weights)) == first
    second = prediction_folder(run, str(tmp_path / "b/cohort"), TABLE, str(weights))
    assert second == run / "predict" / "cohort-2"
    weights.write_bytes(b"others")
    assert prediction_folder(run, str(tmp_path / "a/cohort"), TABLE, str(weights)).name == "cohort-3"
    about = json.loads((second / "dataset_description.json").read_text())
    assert about["DatasetType"] == "derivative"
    assert about["SourceDatasets"] == [{"URL": (tmp_path / "b/cohort").as_uri()}]
    assert (first / "volumes.csv").read_text() == "x"


def test_data_without_a_path_are_known_by_their_visits(tmp_path, weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = prediction_folder(tmp_path, "phantom", TABLE, None)
    assert prediction_folder(tmp_path, "phantom", TABLE, None) == first
    assert prediction_folder(tmp_path, "phantom", TABLE.assign(age=51.0), None).name == "phantom-2"


@pytest.mark.parametrize("name", ["sub-01_T1w.nii.gz", "sub-01_T1w.nii", "sub-01_T1w.csv", "sub-01_T1w.tsv"])
def test_the_name_is_that_of_the_file(name, tmp_path):
    (tmp_path / name).touch()
    assert prediction_folder(tmp_path, str(tmp_path / name), TABLE, None).name == "sub-01_T1w"


def test_files_of_others_are_not_written_among(tmp_path):
    (tmp_path / "predict" / "phantom").mkdir(parents=True)
    (tmp_path / "predict" / "phantom" / "mine.txt").touch()
    assert prediction_folder(tmp_path, "phantom", TABLE, None).name == "phantom-2"
