"""What a run has written stays, whatever a later command does."""

from __future__ import annotations

import errno

import pytest
import torch
from helpers import TINY_NET, fit, sentence

from lssl.cli.main import main
from lssl.runs.folder import written_into
from lssl.utils.errors import InputError, input_error

QUIET = ["--trainer.callbacks=null"]
NARROW = {"network": {**TINY_NET["network"], "init_args": TINY_NET["network"]["init_args"] | {"features": [6] * 6}}}


def files(folder):
    kept = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("metrics")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


@pytest.mark.slow
def test_a_failed_resume_changes_nothing(tmp_path, capsys):
    run = fit(tmp_path, "demo.yaml", options=QUIET, backbone=TINY_NET)
    before = files(run)
    assert {"config.yaml", "checkpoints/last.ckpt", "checkpoints/best.ckpt"} <= set(before)
    try:  # another network: found when the weights are loaded
        fit(tmp_path, "demo.yaml", options=[*QUIET, "--ckpt_path=last"], backbone=NARROW)
    except (SystemExit, RuntimeError):
        pass
    else:
        raise AssertionError("weights of another network were loaded")
    assert files(run) == before
    capsys.readouterr()  # what was said of the other network

    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    damaged = files(run)
    args = ["fit", "--config", str(run / "config.yaml"), "--ckpt_path=last"]
    assert "go on with --ckpt_path best" in sentence(capsys, *args)
    assert files(run) == damaged

    main(["fit", "--config", str(run / "config.yaml")])  # a new run
    assert files(run) == damaged
    assert files(tmp_path / "run-2").keys() == before.keys()


def test_a_moved_run_goes_on_with_its_best_score(tmp_path):
    run = fit(tmp_path, "demo.yaml", options=QUIET, backbone=TINY_NET)
    moved = run.rename(tmp_path / "moved")
    best = best_of(moved)
    config = moved / "config.yaml"
    text = config.read_text()
    main(["fit", "--config", str(config), "--ckpt_path=last", "--trainer.max_steps=4"])
    assert not run.exists()
    assert (moved / "config.1.yaml").read_text() == text
    after = best_of(moved)
    assert after["dirpath"] == str(moved / "checkpoints")
    assert after["best_model_path"] == str(moved / "checkpoints" / "best.ckpt")
    assert after["best_model_score"] <= best["best_model_score"]
    (moved / "checkpoints" / "best.ckpt").unlink()  # then the search begins anew
    main(["fit", "--config", str(config), "--ckpt_path=last", "--trainer.max_steps=6"])
    assert (moved / "checkpoints" / "best.ckpt").is_file()


def best_of(run):
    callbacks = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    return next(state for name, state in callbacks.items() if "val/loss" in name)


def test_a_place_without_permission_is_one_sentence(monkeypatch, capsys):
    def forbidden(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "/closed/run")

    monkeypatch.setattr("lssl.runs.show.show_command", forbidden)
    assert "/closed/run may not be used by this user (no permission)" in sentence(capsys, "show", "x")
    assert input_error(PermissionError("of no place")) is None


@pytest.mark.parametrize(("number", "found"), [(errno.EACCES, "no permission"), (errno.ENOENT, "is gone")])
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, number, found):
    run = tmp_path / "run"
    with pytest.raises(InputError, match=found):
        written_into(run)(OSError, OSError(number, "", str(run / "metrics.csv")), None)
    written_into(run)(OSError, OSError(number, "", str(tmp_path / "scan.nii.gz")), None)  # another error
