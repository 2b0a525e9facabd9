"""Real heads: tissue from one labelled brain, lesions as a smoke run, and both visits of a subject as label maps."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from helpers import TINY_NET, fit

from lssl.cli.main import main

DATA = Path(os.environ.get("LSSL_REAL_DATA", Path(__file__).parents[3] / "shared" / "data")) / "mri"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real MRI at {DATA}; set LSSL_REAL_DATA"),
]
FILES = ["--data=NiftiDataModule", f"--data.init_args.root={DATA}"]
SMALL = ["--data.init_args.few_shot.steps=1", "--trainer.max_steps=1", "--model.init_args.window_overlap=0"]


def split(tmp_path, names, suffix="T1w"):
    """A table of single visits: the first to train on, the second to validate, the others to test."""
    rows = []
    for number, name in enumerate(names):
        path = sorted((DATA / name).glob(f"*/anat/{name}_*_{suffix}.nii.gz"))[0].relative_to(DATA)
        rows.append((name, path.parts[1], str(path), ("train", "val", "test")[min(number, 2)]))
    pd.DataFrame(rows, columns=["subject", "session", "image", "split"]).to_csv(tmp_path / "table.csv", index=False)
    return f"--data.init_args.table={tmp_path / 'table.csv'}"


@pytest.mark.slow
def test_tissue_from_one_brain_and_both_visits_of_another_subject(tmp_path):
    labels = "--data.init_args.labels=derivatives/labels/{subject}/anat/{subject}_desc-tissue_dseg.nii.gz"
    table = split(tmp_path, ["sub-ixi012", "sub-ixi013", "sub-ixi014"])
    options = [*FILES, table, labels, *SMALL, "--model.init_args.classes=null"]
    run = fit(tmp_path, "finetune.yaml", options=options, backbone=TINY_NET)
    command = ["--config", str(run / "config.yaml"), "--ckpt_path", "best"]
    main(["test", *command])
    scores = pd.read_csv(next(run.glob("test/*/segmentation.csv")))
    assert set(scores["structure"].astype(str)) == {"1", "2", "3", "4"}
    assert set(scores["subject"]) == {"sub-ixi014"}
    (tmp_path / "oms").mkdir()
    (tmp_path / "oms" / "sub-oms01").symlink_to(DATA / "sub-oms01")
    main(["predict", *command, "--data.init_args.table=null", f"--data.init_args.root={tmp_path / 'oms'}"])
    for session in ("ses-01", "ses-02"):
        name = Path("sub-oms01") / session / "anat"
        written = nib.load(run / "predict" / "oms" / name / f"sub-oms01_{session}_desc-lssl_dseg.nii.gz")
        source = nib.load(DATA / name / f"sub-oms01_{session}_T1w.nii.gz")
        assert written.shape == source.shape
        np.testing.assert_array_equal(written.affine, source.affine)


def test_lesions_run(tmp_path):
    labels = "--data.init_args.labels=derivatives/labels/{subject}/anat/{subject}_desc-lesion_mask.nii.gz"
    table = split(tmp_path, ["sub-omx07", "sub-mls18", "sub-omx19"], "FLAIR")
    options = [*FILES, table, labels, *SMALL, "--model.init_args.classes={lesion: [1]}"]
    run = fit(tmp_path, "finetune.yaml", options=options, backbone=TINY_NET)
    assert "val/dice" in (run / "metrics.csv").read_text()
