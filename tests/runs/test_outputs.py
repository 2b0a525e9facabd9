"""The files between stages: what is written is what is read, and a file of another shape is refused."""

import json

import pandas as pd
import pytest

from lssl.runs.outputs import (
    RunCost,
    RunReport,
    Score,
    read_cost,
    read_report,
    read_scores,
    write_cost,
    write_report,
    write_scores,
)
from lssl.utils.errors import InputError

SCORES = [
    Score("007", "ses-1", "cortex", "dice", 0.5),
    Score("007", "ses-1/ses-2", "NA", "stcs", 0.75),  # a class may be called like pandas' missing value
    Score("007", "", "cortex", "reversal_rate", 0.25),
    Score("", "", "diagnosis", "auc", 0.75),  # of the whole cohort
]


def test_scores_come_back_as_they_were(tmp_path):
    written = write_scores(tmp_path / "test" / "cohort", SCORES)
    read = read_scores(tmp_path)
    pd.testing.assert_frame_equal(read, written)
    assert [Score(*row) for row in read.itertuples(index=False)] == SCORES
    assert [path.name for path in (tmp_path / "test" / "cohort").iterdir()] == ["segmentation.csv"]
    write_scores(tmp_path / "test" / "other", SCORES, "subject_scores.csv")
    with pytest.raises(InputError, match="scores of several cohorts"):
        read_scores(tmp_path)


def test_cost_and_report_come_back_as_they_were(tmp_path):
    assert read_cost(tmp_path) is None
    assert read_report(tmp_path) is None
    cost, report = RunCost(*range(1, 21)), RunReport({"rank/a": 2.0}, {"rank/a": 3.0})
    write_cost(tmp_path, cost)
    write_report(tmp_path, report)
    assert read_cost(tmp_path) == cost
    assert read_report(tmp_path) == report


@pytest.mark.parametrize(
    ("file", "read", "text"),
    [
        ("cost.json", read_cost, json.dumps({"ms_per_step": 3.5})),
        ("report.json", read_report, json.dumps({"trained": {}, "untrained": {}, "more": {}})),
        ("report.json", read_report, "[1, 2]"),
        ("test/segmentation.csv", read_scores, "subject,structure,metric,value\n007,cortex,dice,0.5\n"),
        ("test/segmentation.csv", read_scores, ""),
        ("test/segmentation.csv", read_scores, None),
    ],
)
def test_another_shape_is_one_sentence(tmp_path, file, read, text):
    (tmp_path / "test").mkdir()
    if text is not None:
        (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=file):
        read(tmp_path)
