"""Real lesions that changed: FLAIR pairs of three subjects, each left out once, through fit, test and predict."""

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
SUBJECTS = ("sub-oms01", "sub-oms03", "sub-oms19")

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real MRI at {DATA}; set LSSL_REAL_DATA"),
]


@pytest.mark.parametrize("left_out", SUBJECTS)
def test_three_subjects_each_left_out_once(left_out, tmp_path):
    rows = []
    for subject in SUBJECTS:
        for session in ("ses-01", "ses-02"):
            image = f"{subject}/{session}/anat/{subject}_{session}_FLAIR.nii.gz"
            label = f"derivatives/labels/{subject}/anat/{subject}_desc-lesionchange_mask.nii.gz"
            split = "test" if subject == left_out else "train"
            rows.append((subject, session, image, label if session == "ses-02" else "", split))
    pd.DataFrame(rows, columns=["subject", "session", "image", "label", "split"]).to_csv(
        tmp_path / "table.csv", index=False
    )
    options = ["--data=NiftiDataModule", f"--data.init_args.root={DATA}"]
    options += [f"--data.init_args.table={tmp_path / 'table.csv'}"]
    steps = os.environ.get("LSSL_STEPS", "100")
    options += [f"--trainer.max_steps={steps}", "--views.size=48", "--model.init_args.classes={change: [1]}"]
    options += ["--model.init_args.window_overlap=0.25", "--data.init_args.num_workers=0"]
    run = fit(tmp_path, "change_segmenter.yaml", options=options, backbone=TINY_NET)
    command = ["--config", str(run / "config.yaml"), "--ckpt_path", "last"]
    main(["test", *command])
    (row,) = pd.read_csv(next(run.glob("test/*/lesions.tsv")), sep="\t").to_dict("records")
    assert (row["subject"], row["session"], row["class"]) == (left_out, "ses-01/ses-02", "change")
    assert row["true_lesions"] > 0
    assert next(run.glob("test/*/pictures/*.png")).is_file()
    main(["predict", *command])
    files = sorted(run.glob("predict/*/sub-*/ses-*/anat/*.nii.gz"))
    assert [path.name for path in files] == [f"{subject}_ses-02_desc-lsslchange_dseg.nii.gz" for subject in SUBJECTS]
    for path, subject in zip(files, SUBJECTS, strict=True):
        source = nib.load(DATA / f"{subject}/ses-02/anat/{subject}_ses-02_FLAIR.nii.gz")
        written = nib.load(path)
        assert written.shape == source.shape
        np.testing.assert_array_equal(written.affine, source.affine)
    assert len(pd.read_csv(next(run.glob("predict/*/lesions.tsv")), sep="\t")) == 3
