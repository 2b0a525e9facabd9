"""``--ckpt_path last``: the newest run of a command goes on, said aloud, and never an older one in silence."""

import os

import pytest
import torch
import yaml
from helpers import TINY_NET, VISIT_ORDER, fit, sentence, tiny

from lssl.cli.main import main
from lssl.runs.folder import checkpoint_path
from lssl.runs.siblings import choose_run
from lssl.utils.errors import InputError

CALM = {"model": {"class_path": "A", "init_args": {"tap": "b"}}, "views": {"size": 32}}


@pytest.fixture
def runs(tmp_path):
    """Makes runs of one command, each as old as its name says."""

    def make(**settings):
        for name, (age, model) in settings.items():
            saved = tmp_path / name.replace("_", "-") / "checkpoints" / "last.ckpt"
            saved.parent.mkdir(parents=True)
            saved.touch()
            os.utime(saved, (age, age))
            (saved.parents[1] / "config.yaml").write_text(yaml.safe_dump({**CALM, "model": model, "trainer": {}}))
        return tmp_path / "again"

    return make


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr("lssl.runs.siblings.rank_zero_info", lines.append)
    return lines


def test_the_newest_of_the_same_settings_is_meant(runs, said):
    other = {"class_path": "A", "init_args": {"tap": "c"}}
    folder = runs(again=(9, CALM["model"]), again_2=(20, CALM["model"]), again_3=(10, CALM["model"]), again_x=(99, {}))
    assert choose_run(folder, "last", CALM).name == "again-2"  # by time, not by number
    assert "of " + str(folder) + "-2 (the newest of " in said.pop()
    runs(again_10=(30, other))
    assert choose_run(folder, "last", CALM).name == "again-2"
    assert f"{folder}-10 is newer, but its model.init_args.tap differs" in said.pop()
    with pytest.raises(
        InputError, match=r"none has the settings .*\(model.init_args.tap differs in the newest\).*again-10/con"
    ):
        choose_run(folder, "last", {**CALM, "views": {"size": 48}})


def test_a_run_named_by_its_own_config_is_meant(runs, said):
    folder = runs(again=(1, CALM["model"]), again_2=(2, CALM["model"]))
    assert choose_run(folder, "last", {}, named=True) == folder
    assert f"newer is {folder}-2" in said.pop()


def test_one_run_alone_is_no_choice_and_a_run_without_weights_is_none(runs, said):
    folder = runs(again=(1, CALM["model"]))
    folder.with_name("again-2").mkdir()
    folder.with_name("again-2").joinpath("config.yaml").touch()
    assert choose_run(folder, "last", {"views": {}}) == folder
    assert not said
    (folder / "checkpoints" / "last.ckpt").rename(folder.with_name("again-2") / "hpc_ckpt_1.ckpt")
    assert choose_run(folder, "last", {"views": {}}).name == "again-2"
    assert f"{folder} has no checkpoint" in said.pop()


def test_a_run_without_validation_has_no_best_and_says_so(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(InputError, match=r"not been validated yet; --ckpt_path last takes"):
        checkpoint_path("best", tmp_path)
    with pytest.raises(InputError, match=r"starts a new run"):
        checkpoint_path("last", tmp_path / "other")


def test_the_same_command_goes_on_with_its_newest_run(tmp_path, caplog, capsys):
    quiet = ["--trainer.callbacks=null", "--monitor.every=0"]
    for number in ("", "-2"):
        fit(tmp_path, "demo.yaml", options=quiet, backbone=TINY_NET)
        assert f"Run folder: {tmp_path / 'run'}{number}" in capsys.readouterr().out
    first = (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes()
    with caplog.at_level("INFO"):
        fit(tmp_path, "demo.yaml", options=[*quiet, "--ckpt_path=last", "--trainer.max_steps=3"], backbone=TINY_NET)
    assert f"--ckpt_path last: of {tmp_path / 'run-2'} (the newest of" in caplog.text
    assert torch.load(tmp_path / "run-2" / "checkpoints" / "last.ckpt", weights_only=False)["global_step"] == 3
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes() == first
    assert not (tmp_path / "run-3").exists()
    main(["test", "--config", str(tmp_path / "run" / "config.yaml"), "--ckpt_path", "last"])  # named: no choice
    assert (tmp_path / "run" / "test").is_dir()
    assert not (tmp_path / "run-2" / "test").exists()


def test_a_run_that_fails_at_its_first_step_leaves_no_folder_and_no_promise(tmp_path, capsys, monkeypatch):
    (tmp_path / "my_refusal.py").write_text(VISIT_ORDER.replace('return {"order"', 'return {"odder"'))
    monkeypatch.syspath_prepend(tmp_path)
    model = {"class_path": "my_refusal.VisitOrder", "init_args": {"loss_weights": {"order": 1.0}}}
    small = tiny(tmp_path, backbone=TINY_NET, model=model)
    assert "has no term 'order'" in sentence(capsys, "fit", *small)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()  # a folder of the user's stays
    (tmp_path / "run" / "notes.txt").touch()
    sentence(capsys, "fit", *small)
    assert (tmp_path / "run" / "notes.txt").is_file()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(SystemExit):
        main(["fit", *small])
    said = capsys.readouterr()
    assert "has no term 'order'" in said.err
    assert "un folder" not in said.out + said.err
    assert "run-2" not in said.out + said.err
    assert not (tmp_path / "run-2").exists()


def test_a_refusal_is_not_preceded_by_a_folder(tmp_path, capsys, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    caplog.set_level("INFO")
    with pytest.raises(SystemExit):
        fit(tmp_path, "demo.yaml", options=["--views.size=80"], backbone=TINY_NET)
    out = capsys.readouterr()
    assert "do not fit" in out.err
    assert "run-2" not in out.out + out.err + caplog.text
    assert not (tmp_path / "run-2").exists()
