"""Every shipped YAML of data runs, with a tiny override; and the recipe of the network for any contrast."""

import shutil
from pathlib import Path

import nibabel as nib
import pytest
from helpers import ROOT, TINY_NET, tiny

from lssl.checkpoint import load_task
from lssl.cli.main import main
from lssl.synthetic.phantom_image import scan

SLOW = pytest.mark.slow


@SLOW
def test_data_phantom(tmp_path):
    options = ["--data.init_args.subjects=4", "--data.init_args.size=40", "--data.init_args.spacing=5"]
    args = ["fit", "--config", str(ROOT / "configs/demo.yaml"), *tiny(tmp_path, backbone=TINY_NET)]
    main([*args, "--config", str(ROOT / "configs/data/heads.yaml"), *options, "--trainer.callbacks=null"])
    assert (tmp_path / "run" / "config.yaml").is_file()


def label_maps(tmp_path) -> Path:
    """Three procedural heads as label maps."""
    (tmp_path / "maps").mkdir()
    for number in range(3):
        made = scan(0, number, 0, 0.0, (40, 44, 40), 4.0)
        path = tmp_path / "maps" / f"sub-{number}_dseg.nii.gz"
        nib.save(nib.Nifti1Image(made.label.numpy(), made.affine.numpy()), path)
    return tmp_path / "maps"


def test_data_label_maps(tmp_path):
    options = [f"--data.init_args.root={label_maps(tmp_path)}", "--data.init_args.size=40"]
    args = ["fit", "--config", str(ROOT / "configs/demo.yaml"), *tiny(tmp_path, backbone=TINY_NET)]
    options += ["--data.init_args.split=[0.34,0.33,0.33]", "--trainer.callbacks=null", "--data.init_args.spacing=4"]
    main([*args, "--config", str(ROOT / "configs/data/label_maps.yaml"), *options])
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


@SLOW
def test_the_recipe_of_the_released_network(tmp_path):
    """release/brains.yaml, in small; it counts the labels of a sample, not of its 1000 pairs."""
    small = {"root": label_maps(tmp_path), "size": 32, "spacing": 6.0, "num_workers": 0, "held_out": 1}
    options = [f"--data.init_args.{name}={value}" for name, value in small.items()]
    options += ["--views.size=32", "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    main(["fit", "--config", str(ROOT / "configs/release/brains.yaml"), *options])
    task = load_task(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert "cortex" in task.known_classes().names


def test_data_synthetic_brains(tmp_path):
    """Random shapes alone: heads take seconds to make."""
    values = {"shapes": 1, "pairs_per_epoch": 4, "held_out": 2, "size": 32}
    options = [f"--data.init_args.{name}={value}" for name, value in values.items()]
    args = ["fit", "--config", str(ROOT / "configs/demo.yaml"), *tiny(tmp_path, backbone=TINY_NET)]
    main([*args, "--config", str(ROOT / "configs/data/synthetic_brains.yaml"), *options, "--trainer.callbacks=null"])
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


@SLOW  # test_endings.py goes further
def test_data_visits(tmp_path, bids):
    options = [f"--data.init_args.root={bids}", "--data.init_args.num_workers=0", "--trainer.callbacks=null"]
    args = ["fit", "--config", str(ROOT / "configs/demo.yaml"), *tiny(tmp_path, backbone=TINY_NET)]
    main([*args, "--config", str(ROOT / "configs/data/nifti.yaml"), *options])
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.smoke
@SLOW
def test_data_prepared(tmp_path, bids):
    """From a BIDS folder to a trained network, in two commands."""
    for spare in ("sub-03", "sub-04", "sub-05"):
        shutil.rmtree(bids / spare)
    main(["prepare", str(bids), str(tmp_path / "prepared"), "--spacing", "4"])
    options = [f"--data.init_args.root={tmp_path / 'prepared'}", "--data.init_args.num_workers=0"]
    options.append("--data.init_args.misaligned=keep")  # noisy balls have no orientation to be found
    args = ["fit", "--config", str(ROOT / "configs/demo.yaml"), *tiny(tmp_path, backbone=TINY_NET)]
    main([*args, "--config", str(ROOT / "configs/data/prepared.yaml"), *options, "--trainer.callbacks=null"])
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
