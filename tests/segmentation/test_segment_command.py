"""``lssl segment``, and small files of weights."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import CHECKPOINT, TINY_NET, fit, sentence, tiny

import lssl
from lssl.checkpoint import read_checkpoint
from lssl.cli.main import main
from lssl.segmentation.volumes import largest_part
from lssl.synthetic.phantom_image import scan

MODEL = {
    "class_path": "lssl.Segmenter",
    "init_args": {"classes": {"cortex": [3, 42], "white matter": [2, 41]}, "window_overlap": 0.0},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A Segmenter in a small file."""
    folder = tmp_path_factory.mktemp("weights")
    run = fit(folder, model=MODEL, backbone=TINY_NET, options=["--data.init_args.few_shot.steps=2"])
    main(["export", str(run), str(folder / "small"), "--to", "lssl"])
    return folder / "small" / "weights.ckpt"


@pytest.fixture
def scans(tmp_path):
    """Two scans of one head, on different grids."""
    paths = []
    for number, spacing in enumerate((5.0, 4.0)):
        found = scan(0, 0, 0, 0.0, (40, 44, 40), spacing)
        path = tmp_path / f"sub-07_ses-{number}_T1w.nii.gz"
        nib.save(nib.Nifti1Image((1000 * found.image.numpy()).astype(np.int16), found.affine.numpy()), path)
        paths.append(str(path))
    return paths


def test_files_get_label_maps_volumes_and_a_change(weights, scans, tmp_path, capsys):
    out = tmp_path / "out"
    main(["segment", *scans, "--years", "61.5", "63", "-o", str(out), "--weights", str(weights)])
    said = capsys.readouterr().out
    assert "white matter" in said
    assert "0 pairs" not in said
    for path, found in zip(scans, sorted(out.glob("sub-07/ses-*/anat/*_dseg.nii.gz")), strict=True):
        image, label = nib.load(path), nib.load(found)
        assert np.allclose(image.affine, label.affine)
        assert image.shape == label.shape
    volumes, change = pd.read_csv(out / "volumes.csv"), pd.read_csv(out / "change.csv")
    assert sorted(volumes["years"].unique()) == pytest.approx([0, 1.5], abs=1e-3)
    assert len(volumes) == 2 * len(change) == 4
    assert (out / "pictures" / "sub-07.png").is_file()


def test_one_file_of_no_bids_name_is_one_subject(weights, scans, tmp_path, capsys):
    path = tmp_path / "my head.nii.gz"
    nib.save(nib.load(scans[0]), path)
    main(["segment", str(path), "-o", str(tmp_path / "out"), "--weights", str(weights)])
    assert "my head" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "out" / "volumes.csv")["subject"].unique() == ["my head"]


def test_two_images_of_one_visit_are_told_apart(weights, scans, tmp_path):
    other = scans[0].replace("_T1w", "_FLAIR")
    nib.save(nib.load(scans[0]), other)
    main(["segment", scans[0], other, "-o", str(tmp_path / "out"), "--weights", str(weights)])
    assert pd.read_csv(tmp_path / "out" / "volumes.csv")["subject"].nunique() == 2


def test_a_bids_folder_is_taken_whole(weights, bids, tmp_path):
    main(["segment", str(bids), "-o", str(tmp_path / "out"), "--weights", str(weights)])
    assert len(list((tmp_path / "out").rglob("*_dseg.nii.gz"))) == 10


def test_what_lies_apart_is_kept_unless_the_user_says_otherwise(weights, scans, tmp_path, monkeypatch):
    """Left and right of one structure do not touch."""

    def two_parts(self, batch):
        label = torch.zeros(batch.extent[0, 1].tolist(), dtype=torch.long)
        label[2:6, 2:6, 2:6], label[20:23, 2:5, 2:5] = 1, 1
        return label

    monkeypatch.setattr(lssl.Segmenter, "_segmented", two_parts)
    for options, voxels in ([], 64 + 27), (["--largest"], 64):
        out = tmp_path / f"out-{voxels}"
        main(["segment", scans[0], "-o", str(out), "--weights", str(weights), *options])
        label = np.asarray(nib.load(next(out.rglob("*_dseg.nii.gz"))).dataobj)
        assert (label > 0).sum() == voxels


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere.nii.gz"], "nowhere.nii.gz"),
        (["a.nii.gz", "b.nii.gz"], "a.nii.gz does not exist"),
        (["{0}", "--years", "1", "2"], "give one number for each of the 1 images, not 2"),
        (["{0}", "{0}"], "the same name"),
        (["{0}", "{1}", "--weights", "runs/none"], "runs/none is neither a checkpoint nor a run folder"),
    ],
)
def test_mistakes_are_one_sentence(args, said, weights, scans, tmp_path, capsys):
    args = [arg.format(*scans) for arg in args]
    args += [] if "--weights" in args else ["--weights", str(weights)]
    assert said in sentence(capsys, "segment", *args, "-o", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_weights_of_a_pretraining_are_refused(scans, tmp_path, capsys):
    run = fit(tmp_path, "masked_autoencoder.yaml", options=CHECKPOINT, backbone=TINY_NET)
    said = sentence(capsys, "segment", scans[0], "-o", str(tmp_path / "out"), "--weights", str(run))
    assert "is of a MaskedAutoencoder" in said


# --- small files --------------------------------------------------------------------------------


def test_a_small_file_rounds_kernels_and_keeps_no_path(weights, tmp_path):
    small, whole = read_checkpoint(weights), weights.parents[1] / "run" / "checkpoints" / "last.ckpt"
    assert str(weights.parents[1]) not in str(small)
    state = read_checkpoint(whole)["state_dict"]
    for name, value in small["state_dict"].items():
        assert torch.allclose(value.double(), state[name].double(), rtol=1e-3, atol=1e-6), name
    assert weights.stat().st_size < whole.stat().st_size / 3


def test_a_small_file_starts_a_fine_tuning(weights, tmp_path, caplog):
    options = [f"--model.init_args.pretrained={weights}", "--trainer.limit_val_batches=0"]
    fit(tmp_path, "finetune.yaml", options=options)
    assert "parameters of the network matched" in caplog.text


def test_a_small_file_is_no_run_to_go_on_with(weights, tmp_path, capsys):
    model = tiny(tmp_path, model=MODEL, backbone=TINY_NET)
    said = sentence(capsys, "fit", "--config", "finetune", *model, "--ckpt_path", str(weights))
    assert "weights alone, so no run can go on" in said


def test_islands_are_left_out():
    label = torch.zeros(9, 9, 9, dtype=torch.long)
    label[1:4, 1:4, 1:4], label[4, 4, 4], label[7, 7, 7] = 1, 2, 3  # 2 touches 1 at a corner, 3 nothing
    kept = largest_part(label)
    assert kept.unique().tolist() == [0, 1, 2]
    assert torch.equal(kept[:6], label[:6])
    assert not largest_part(torch.zeros_like(label)).any()
