"""Real T1w, T2w and FLAIR: prepared and learned from where a visit lacks one, and predicted from what is there."""

from __future__ import annotations

import copy
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
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real MRI at {DATA}; set LSSL_REAL_DATA"),
]
NET = copy.deepcopy(TINY_NET) | {"in_channels": 2}  # and so its network
KEEP = ["--data.init_args.missing_channels=keep", "--views.contrasts=mix"]


def image(name: str, session: str, suffix: str) -> Path:
    return Path(name) / session / "anat" / f"{name}_{session}_{suffix}.nii.gz"


@pytest.mark.parametrize(
    ("name", "suffixes", "channels"),
    [
        ("sub-oms19", ("T1w", "FLAIR"), ["FLAIR", "T1w+FLAIR"]),
        ("sub-oms03", ("T1w", "T2w", "FLAIR"), ["T2w+FLAIR", "T1w+T2w+FLAIR"]),
    ],
)
def test_some_contrasts_then_all_are_prepared_and_learned_from(name, suffixes, channels, tmp_path):
    (tmp_path / "bids").mkdir()
    (tmp_path / "bids" / name).symlink_to(DATA / name)
    options = ["--suffix", *suffixes, "--missing-channels", "keep", "--spacing", "3", "--masks", "none"]
    main(["prepare", str(tmp_path / "bids"), str(tmp_path / "out"), *options, "--labels", "none"])
    table = pd.read_csv(tmp_path / "out/visits.csv")
    assert table["channels"].tolist() == channels
    assert table["aligned"].all()
    assert table["flags"].isna().all()
    data = ["--data=PreparedDataModule", f"--data.init_args.root={tmp_path / 'out'}", *KEEP]
    data += ["--data.init_args.split=[1.0,0.0,0.0]", "--monitor.every=0"]
    net = NET | {"in_channels": len(suffixes)}
    run = fit(tmp_path, "longitudinal_infonce.yaml", options=data, backbone=net)
    assert (run / "checkpoints/last.ckpt").is_file()


def test_segmented_from_both_and_from_flair_alone(tmp_path):
    """The second visit lacks T1w in the table; visits of another data set are predicted from what they have."""
    rows = []
    for name, part in (("sub-omx07", "train"), ("sub-mls18", "train"), ("sub-omx19", "val")):
        t1, flair = (str(image(name, "ses-01", suffix)) for suffix in ("T1w", "FLAIR"))
        rows.append((name, "ses-01", "" if name == "sub-mls18" else t1, flair, part))
    columns = ["subject", "session", "T1w", "FLAIR", "split"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "table.csv", index=False)
    labels = "derivatives/labels/{subject}/anat/{subject}_desc-lesion_mask.nii.gz"
    files = ["--data=NiftiDataModule", f"--data.init_args.root={DATA}", "--data.init_args.suffix=[T1w,FLAIR]", *KEEP]
    files += [f"--data.init_args.table={tmp_path / 'table.csv'}", f"--data.init_args.labels={labels}"]
    small = ["--data.init_args.few_shot.steps=1", "--trainer.max_steps=1", "--model.init_args.window_overlap=0"]
    run = fit(tmp_path, "finetune.yaml", options=[*files, *small, "--model.init_args.classes=null"], backbone=NET)
    (tmp_path / "oms").mkdir()
    (tmp_path / "oms" / "sub-oms19").symlink_to(DATA / "sub-oms19")
    command = ["--config", str(run / "config.yaml"), "--ckpt_path", "last", "--data.init_args.table=null"]
    main(["predict", *command, f"--data.init_args.root={tmp_path / 'oms'}"])
    for session in ("ses-01", "ses-02"):
        (found,) = run.glob(f"predict/oms/sub-oms19/{session}/anat/*_dseg.nii.gz")
        source = nib.load(DATA / image("sub-oms19", session, "FLAIR"))
        assert nib.load(found).shape == source.shape
        np.testing.assert_array_equal(nib.load(found).affine, source.affine)
