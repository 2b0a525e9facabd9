"""Runs of the Segmenter from end to end, and what they refuse."""

import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers import TINY_NET, fit, sentence, tiny

from lssl import Segmenter
from lssl.checkpoint import load_task
from lssl.cli.main import main

# --- from end to end --------------------------------------------------------------------------------------------------


QUIET = ["--data.init_args.few_shot.steps=2", "--model.init_args.classes={'white matter': [2, 41], 'cortex': [3, 42]}"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return fit(
        tmp_path_factory.mktemp("pretrained"), "demo.yaml", options=["--trainer.callbacks=null"], backbone=TINY_NET
    )


def fine_tune(folder, pretrained, *options):
    """From the checkpoint, with a frozen encoder."""
    checkpoint = pretrained / "checkpoints" / "last.ckpt"
    start = [f"--model.init_args.pretrained={checkpoint}", "--model.init_args.lr_multipliers={encoder: 0}"]
    return fit(folder, "demo_finetune.yaml", options=[*QUIET, *start, *options], backbone=TINY_NET)


@pytest.fixture(scope="module")
def run(pretrained, tmp_path_factory):
    return fine_tune(tmp_path_factory.mktemp("run"), pretrained)


def state(run, name="last"):
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=False)["state_dict"]


def test_it_starts_from_the_checkpoint_and_leaves_what_is_frozen(run, pretrained):
    before, after = state(pretrained), state(run)
    network = [name for name in before if name.startswith("backbone.network.")]
    changed = {name for name in network if not torch.equal(before[name], after[name])}
    assert changed
    assert not [name for name in changed if name.startswith(("backbone.network.conv_0", "backbone.network.down_"))]
    assert after["head.weight"].shape[0] == 3


def test_scores_files_and_pictures(run, pretrained, capsys):
    kept = run.with_name("moved")
    shutil.move(pretrained, kept)  # testing needs the run's own checkpoint only
    main(["test", "--config", str(run / "config.yaml"), "--ckpt_path", "best"])
    shutil.move(kept, pretrained)
    said = capsys.readouterr().out
    assert "mean over subjects" in said
    rows = [line for line in said.splitlines() if line.startswith(("┃", "│"))]
    assert 0 < max(map(len, rows)) <= 80
    assert any(line.startswith("│white matter") for line in rows)
    assert said.count("mean over subjects") == 1
    assert "Test metric" not in said  # Lightning's own table, of the same figures
    assert said.splitlines()[-2] == f"Folder: {run / 'test' / 'phantom'}"
    assert said.splitlines()[-1] == f"Next: lssl predict --config {run / 'config.yaml'} --ckpt_path best"
    table = pd.read_csv(run / "test" / "phantom" / "segmentation.csv")
    assert list(table.columns) == ["subject", "session", "structure", "metric", "value", "cluster"]
    assert set(table["structure"]) == {"white matter", "cortex"}
    assert {"dice", "missed", "volume", "true_volume", "true_aspc", "true_stcs", "trajectory_error"} <= set(
        table["metric"]
    )
    assert len(table[table["metric"] == "true_volume"]) == 2 * 2  # one subject, two visits, two structures
    assert {path.name for path in (run / "test" / "phantom" / "pictures").iterdir()} == {f"{table['subject'][0]}.png"}
    assert "test/dice" in (run / "test" / "metrics.csv").read_text()


def test_prediction_of_a_folder_and_of_a_file(run, bids, capsys):
    """From phantoms of 5 mm to files of 4 mm, whose grid the label maps take."""
    command = ["predict", "--config", str(run / "config.yaml"), "--ckpt_path", "best"]
    main([*command, "--data", str(bids)])
    folder = run / "predict" / "bids"
    *_, where, then = capsys.readouterr().out.splitlines()
    assert where == f"Folder: {folder}"
    assert then == f"Next: lssl export {run / 'checkpoints' / 'best.ckpt'} {run / 'export'}"
    files = sorted(path.name for path in folder.rglob("*.nii.gz"))
    assert len(files) == 10
    assert files[0] == "sub-01_ses-M000_desc-lssl_dseg.nii.gz"
    written = nib.load(folder / "sub-01" / "ses-M000" / "anat" / files[0])
    source = nib.load(bids / "sub-01" / "ses-M000" / "anat" / "sub-01_ses-M000_T1w.nii.gz")
    assert written.shape == source.shape
    np.testing.assert_array_equal(written.affine, source.affine)
    labels = np.asarray(written.dataobj)
    assert set(np.unique(labels)) <= {0, 2, 3}
    volumes = pd.read_csv(folder / "volumes.csv")
    assert len(volumes) == 20
    mine = volumes.query("subject == 'sub-01' and session == 'ses-M000' and structure == 'cortex'")["mm3"].item()
    assert mine == (labels == 3).sum() * 64
    assert (folder / "desc-lssl_dseg.tsv").read_text() == "index\tname\n2\twhite matter\n3\tcortex\n"
    file = bids / "sub-02" / "ses-M012" / "anat" / "sub-02_ses-M012_T1w.nii.gz"
    main([*command, "--data", str(file)])
    assert len(pd.read_csv(run / "predict" / "sub-02_ses-M012_T1w" / "volumes.csv")) == 2
    assert len(pd.read_csv(folder / "volumes.csv")) == 20
    assert (folder / "trajectories.png").stat().st_size > 10_000
    assert len(list((folder / "pictures").iterdir())) == 5
    change = pd.read_csv(folder / "change.csv")
    assert len(change) == 5 * 2
    assert change["years"].tolist() == [1.0] * 10  # M000 and M012
    assert change["ml_per_year_se"].isna().all()
    assert not [path for path in folder.rglob("*") if ".part" in path.name]


def test_a_strategy_out_of_its_checkpoint(run):
    loaded = load_task(run / "checkpoints" / "last.ckpt")
    assert isinstance(loaded, Segmenter)
    assert loaded.segment(torch.rand(1, 20, 20, 20), torch.eye(4).double() * 5).shape == (20, 20, 20)


def test_unlabelled_pairs_change_no_crop_of_the_labelled(tmp_path, run, pretrained):
    """The first step's supervised term is the same with and without them."""
    other = fine_tune(tmp_path, pretrained, "--model.init_args.loss_weights.consistency=1")
    without, with_pairs = (pd.read_csv(made / "metrics.csv") for made in (run, other))
    first, second = (log["train/supervised"].dropna().iloc[0] for log in (without, with_pairs))
    assert first == second
    assert "train/consistency" in with_pairs
    assert "train/consistency" not in without


@pytest.mark.slow
def test_a_resumed_run_continues_exactly(tmp_path):
    weights = []
    for name, stages in {"whole": [4], "halves": [2, 4]}.items():
        (tmp_path / name).mkdir()
        for number, stop in enumerate(stages):
            options = [*QUIET, f"--trainer.max_steps={stop}", "--model.init_args.schedule=null"]
            options += ["--model.init_args.loss_weights.consistency=1"]
            if number:  # what it once started from may be gone
                options += ["--ckpt_path=last", "--model.init_args.pretrained=nowhere.ckpt"]
            made = fit(tmp_path / name, "demo_finetune.yaml", options=options, backbone=TINY_NET)
        weights.append(state(made))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=0, msg=name)


@pytest.mark.slow
def test_two_processes_train_together(tmp_path):
    options = [*QUIET, "--trainer.devices=2", "--trainer.strategy=ddp", "--data.init_args.subjects=6"]
    args = ["fit", "--config", "configs/demo_finetune.yaml", *tiny(tmp_path, backbone=TINY_NET), *options]
    command = [sys.executable, "-m", "lssl", *args, "--model.init_args.loss_weights.consistency=1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "val/dice" in (tmp_path / "run" / "metrics.csv").read_text()


# --- bad input --------------------------------------------------------------------------------------------------------


def refused(capsys, tmp_path, *options):
    args = ["fit", "--config", "configs/demo_finetune.yaml", *tiny(tmp_path, backbone=TINY_NET), *QUIET]
    text = sentence(capsys, *args, *options)
    assert not list((tmp_path / "run").glob("*"))
    return text


def test_an_option_that_is_misspelt(capsys, tmp_path):
    text = refused(capsys, tmp_path, "--model.init_args.pretraind=x")
    assert "Segmenter has no option 'pretraind'; did you mean 'pretrained'?" in text


def test_a_class_that_is_never_seen(capsys, tmp_path):
    text = refused(capsys, tmp_path, "--model.init_args.classes={'tumour': [99]}")
    assert "'tumour' (99) is never seen in the labelled training visits, which hold 0, 2, 3" in text


def test_checkpoints_that_do_not_fit(capsys, tmp_path, pretrained, run):
    checkpoint = pretrained / "checkpoints" / "last.ckpt"
    other = yaml.safe_dump(TINY_NET).replace("- 4\n", "- 8\n", 1)
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"backbone": yaml.safe_load(other)}))
    options = ["--config", str(tmp_path / "other.yaml"), f"--model.init_args.pretrained={checkpoint}"]
    assert "conv_0.conv_0.conv.weight is 4×1×3×3×3 there and 8×" in refused(capsys, tmp_path, *options)
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(checkpoint.read_bytes()[:5000])
    assert "is truncated" in refused(capsys, tmp_path, f"--model.init_args.pretrained={cut}")
    command = ["--config", str(run / "config.yaml")]
    assert "not a checkpoint of a Segmenter" in sentence(capsys, "test", *command, "--ckpt_path", str(checkpoint))
    for name in ("test", "predict"):
        assert "learns its classes in `lssl fit`" in sentence(capsys, name, *command)


def test_no_labelled_visit_and_no_image(capsys, tmp_path, bids, run):
    files = ["--data.init_args.root", str(bids)]
    assert "no labelled visit to train on" in refused(capsys, tmp_path, "--data=NiftiDataModule", *files)
    (tmp_path / "empty").mkdir()
    command = ["predict", "--config", str(run / "config.yaml"), "--ckpt_path", "best"]
    text = sentence(capsys, *command, "--data", str(tmp_path / "empty"))
    assert "nor a BIDS folder (sub-*)" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image: nib.Nifti1Image(np.ones(image.shape) * 0.5, image.affine), "not whole numbers"),
        pytest.param(
            lambda image: nib.Nifti1Image(-np.ones(image.shape, np.int16), image.affine),
            "negative value -1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda image: nib.Nifti1Image(np.ones(image.shape, np.int16), image.affine * 2),
            "does not lie on the grid",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_label_maps_that_are_wrong(change, words, capsys, tmp_path, bids):
    for image in bids.glob("sub-*/ses-*/anat/*_T1w.nii.gz"):
        nib.save(change(nib.load(image)), image.with_name(image.name.replace("T1w", "dseg")))
    files = [f"--data.init_args.root={bids}", "--data.init_args.labels={subject}/{session}/anat/*_dseg.nii.gz"]
    assert words in refused(capsys, tmp_path, "--data=NiftiDataModule", *files)
