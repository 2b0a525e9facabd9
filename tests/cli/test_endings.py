"""Every command ends with its folder and a command that works when pasted: from a folder of scans to predictions."""

import shlex
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import yaml
from helpers import TINY_NET

from lssl.cli.endings import _as_read
from lssl.cli.main import main
from lssl.datamodules import NiftiDataModule
from lssl.views.sampler import ViewSampler

BALL = np.linalg.norm(np.mgrid[:40, :40, :40] - 19.5, axis=0) < 15
SMALL = {
    "views": {"size": 32},
    "backbone": TINY_NET,
    "monitor": {"every": 0},
    "trainer": {
        "max_steps": 2,
        "precision": "32-true",
        "accelerator": "cpu",
        "log_every_n_steps": 1,
        "check_val_every_n_epoch": 1,
        "callbacks": None,
        "enable_model_summary": False,
    },
    "data": {
        "init_args": {"num_workers": 0, "source_size": None, "split": [0.5, 0.25, 0.25], "few_shot": {"steps": 1}},
    },
}


@pytest.fixture
def cohort(tmp_path, monkeypatch):
    """Four subjects of two visits a year apart, with labels, in the working directory."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for subject in range(4):
        for session in ("M000", "M012"):
            name = f"sub-{subject}/ses-{session}/anat/sub-{subject}_ses-{session}"
            for folder, suffix, voxels in (
                ("my cohort", "T1w", 100 * BALL * (1 + 0.1 * draw.random(BALL.shape))),
                ("my cohort/derivatives/labels", "dseg", BALL),
            ):
                path = tmp_path / folder / f"{name}_{suffix}.nii.gz"
                path.parent.mkdir(parents=True)
                nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.diag([4.0, 4.0, 4.0, 1.0])), path)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return "my cohort"


@pytest.mark.slow
def test_each_command_leads_to_the_next(cohort, capsys):
    def type_in(words):
        main(words)
        out = capsys.readouterr().out
        lines = out[out.rindex("Next: ") :].splitlines()
        return out, [shlex.split(line.removeprefix("Next: ").strip())[1:] for line in lines]

    out, (prepare,) = type_in(["inspect", cohort])
    assert "label maps" in out
    assert "8 visits of 8" in out
    assert prepare == ["prepare", "my cohort", "my cohort-prepared", "--spacing", "4"]  # tests/prepare go on with it

    labels = ["--data.init_args.labels", "derivatives/labels/{subject}/{session}/anat/*_dseg.nii.gz"]
    small = ["--config", "small.yaml"]
    fit = ["fit", "--config", "longitudinal_infonce", "--data", cohort, *labels]
    out, (show, finetune) = type_in([*fit, *small])
    assert out.index("Run folder: runs/longitudinal_infonce") < out.index("step 2 of 2 (100%)")
    assert "\r" not in out
    assert "curves" in type_in(show)[0]
    weights = ["--model.init_args.pretrained", "runs/longitudinal_infonce/checkpoints/last.ckpt"]
    assert finetune == ["fit", "--config", "finetune", "--data", cohort, *labels, *weights]
    out, (test,) = type_in([*finetune, *small])
    assert "Run folder: runs/finetune" in out
    out, (predict,) = type_in(test)
    assert out.count("┏") == 1
    assert "Folder: runs/finetune/test" in out
    out, (export,) = type_in(predict)
    assert "Folder: runs/finetune/predict/my cohort" in out
    assert export == ["export", "runs/finetune/checkpoints/best.ckpt", "runs/finetune/export"]


def test_fine_tuning_reads_the_channels_that_pretraining_read(cohort):
    """One-contrast data need no option."""
    model = SimpleNamespace(views=ViewSampler(16, contrasts="mix"))
    assert _as_read(model, NiftiDataModule(cohort)) == []
    data = NiftiDataModule(cohort, suffix=["T1w", "FLAIR"], missing_channels="keep")
    assert _as_read(model, data) == [
        *("--data.init_args.suffix", "[T1w,FLAIR]"),
        *("--data.init_args.missing_channels", "keep", "--views.contrasts", "mix"),
    ]
