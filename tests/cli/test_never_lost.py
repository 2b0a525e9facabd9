"""What a run has written stays, whatever a later command does."""

from __future__ import annotations

import errno

import pytest
from helpers import TINY_NET, fit, sentence

from lssl.cli.main import main
from lssl.cli.training import explained
from lssl.utils.errors import InputError

NARROW = {"network": {**TINY_NET["network"], "init_args": TINY_NET["network"]["init_args"] | {"features": [6] * 6}}}


def files(folder):
    kept = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("metrics")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def test_a_failed_resume_changes_nothing(tmp_path, capsys):
    run = fit(tmp_path, "demo.yaml", backbone=TINY_NET)
    before = files(run)
    assert {"config.yaml", "checkpoints/last.ckpt", "checkpoints/best.ckpt"} <= set(before)
    try:  # another network: found when the weights are loaded
        fit(tmp_path, "demo.yaml", options=["--ckpt_path=last"], backbone=NARROW)
    except (SystemExit, RuntimeError):
        pass
    else:
        raise AssertionError("weights of another network were loaded")
    assert files(run) == before

    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    damaged = files(run)
    args = ["fit", "--config", str(run / "config.yaml"), "--ckpt_path=last"]
    assert "go on with --ckpt_path best" in sentence(capsys, *args)
    assert files(run) == damaged

    main(["fit", "--config", str(run / "config.yaml")])  # a new run
    assert files(run) == damaged
    assert files(tmp_path / "run-2").keys() == before.keys()


def test_a_full_disk_is_one_sentence_and_a_missing_file_is_another_error():
    with pytest.raises(InputError, match=r"metrics\.csv could not be written: the disk is full"), explained([]):
        raise OSError(errno.ENOSPC, "No space left on device", "run/metrics.csv")
    with pytest.raises(FileNotFoundError), explained([]):
        raise FileNotFoundError(errno.ENOENT, "No such file", "scan.nii.gz")
