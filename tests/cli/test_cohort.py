"""A cohort from a BIDS folder to volumes: six commands, each as the one before proposes it, and a second cohort."""

import shlex

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml
from helpers import TINY_NET

from lssl.cli.main import main
from lssl.datamodules import PhantomDataModule

STEPS = 30
SMALL = {
    "views": {"size": 32},
    "backbone": TINY_NET,
    "monitor": {"every": 0},
    "trainer": {
        "max_steps": STEPS,
        "precision": "32-true",
        "accelerator": "cpu",
        "log_every_n_steps": STEPS,
        "check_val_every_n_epoch": 1,
        "callbacks": None,
        "enable_model_summary": False,
    },
    "data": {"init_args": {"num_workers": 0, "split": [0.34, 0.33, 0.33]}},
}
TUNED = {"model": {"init_args": {"optimizer": {"init_args": {"lr": 0.03}}}}}


CEREBRUM = (2, 3, 41, 42)  # FreeSurfer's white matter and cortex
VISITS = (3, 2, 2)  # of each subject; registration is what takes the time


def write_cohort(root, seed=0):
    """Procedural heads, with the cerebrum as label."""
    heads = PhantomDataModule(subjects=len(VISITS), visits=max(VISITS), size=44, spacing=4.5, interval=1.0, seed=seed)
    for subject, visits in enumerate(VISITS):
        for visit in range(visits):
            scan = heads.scan(subject, visit)
            name = f"sub-{subject}/ses-M{12 * visit:03d}/anat/sub-{subject}_ses-M{12 * visit:03d}"
            image, cerebrum = 1000 * scan.image.numpy(), np.isin(scan.label.numpy(), CEREBRUM)
            for folder, suffix, voxels in (("", "T1w", image), ("derivatives/labels", "dseg", cerebrum)):
                path = root / folder / f"{name}_{suffix}.nii.gz"
                path.parent.mkdir(parents=True)
                nib.save(nib.Nifti1Image(voxels.astype(np.int16), scan.affine.numpy()), path)


@pytest.fixture
def type_in(tmp_path, monkeypatch, capsys):
    """Runs a command in a folder with a cohort, and returns what it printed and the commands that it proposes."""
    monkeypatch.chdir(tmp_path)
    write_cohort(tmp_path / "cohort")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump(SMALL | TUNED))

    def run(*words):
        main(list(words))
        out = capsys.readouterr().out
        lines = out[out.rindex("Next: ") :].splitlines()
        return out, [shlex.split(line.removeprefix("Next: ").strip())[1:] for line in lines]

    return run


def least_squares(rows):
    """Slope of volume over years in ml, and its standard error (of three visits or more), of one subject."""
    years, ml = rows["years"].to_numpy(), rows["mm3"].to_numpy() / 1000
    slope, level = np.polyfit(years, ml, 1)
    rest = ml - level - slope * years
    return slope, np.sqrt(rest @ rest / max(1, len(ml) - 2) / np.square(years - years.mean()).sum())


@pytest.mark.slow
def test_six_commands_from_scans_to_volumes_and_a_second_cohort(type_in, tmp_path, caplog):
    caplog.set_level("INFO")
    _, (prepare,) = type_in("inspect", "cohort")
    assert prepare == ["prepare", "cohort", "cohort-prepared", "--spacing", "4.5"]
    out, (fit,) = type_in(*prepare)
    assert "7 label maps found for 7 visits: taken for 7" in out
    _, (show, finetune) = type_in(*fit, "--config", "small.yaml")
    assert show == ["show", "runs/longitudinal_infonce"]
    _, (test,) = type_in(*finetune, "--config", "tuned.yaml")
    assert "by LongitudinalLocal (runs/longitudinal_infonce/checkpoints/last.ckpt)" in caplog.text
    _, (predict,) = type_in(*test)
    out, (export,) = type_in(*predict)
    folder = tmp_path / "runs/finetune/predict/cohort-prepared"
    assert f"Folder: {folder.relative_to(tmp_path)}" in out
    assert export[0] == "export"

    volumes, change = pd.read_csv(folder / "volumes.csv"), pd.read_csv(folder / "change.csv")
    assert len(volumes) == 7
    for row, visits in zip(change.itertuples(), VISITS, strict=True):
        slope, error = least_squares(volumes[volumes["subject"] == row.subject])
        assert row.ml_per_year == pytest.approx(slope, rel=1e-3, abs=1e-4)
        if visits > 2:
            assert row.ml_per_year_se == pytest.approx(error, rel=1e-3, abs=1e-4)
            assert row.ml_per_year_low < row.ml_per_year < row.ml_per_year_high
    assert (volumes["mm3"] > 0).all()
    assert (folder / "trajectories.png").stat().st_size > 5000
    assert {path.stem for path in (folder / "pictures").glob("*.png")} == {
        f"sub-{number}" for number in range(len(VISITS))
    }

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    write_cohort(tmp_path / "clinic/cohort-prepared", seed=1)
    out, _ = type_in(*predict, "--data", "clinic/cohort-prepared")
    assert f"Folder: {folder.relative_to(tmp_path)}-2" in out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    other = folder.with_name("cohort-prepared-2")
    assert {path.name for path in other.rglob("*")} == {path.name for path in folder.rglob("*")}
