"""lssl tune: keeps what helps, on top of what helped before; tells what changes the method; a failure is a row."""

import json
import re
from multiprocessing import get_context

import pytest
from helpers import ROOT, TINY_NET, sentence, tiny

from lssl.cli.completion import words
from lssl.cli.trials import Trial, measure, try_settings
from lssl.cli.tune import Tuner

CONFIG = {
    "data": {"init_args": {"batch_size": 2, "num_workers": 0}},
    "backbone": {"channels_last": False, "compile": False, "checkpointing": False},
    "model": {"init_args": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {}}}},
    "trainer": {"precision": "32-true"},
}
SPEED = {"channels_last=true": 1.5, "fused=true": 1.04, "precision=bf16-mixed": 2.0, "compile=true": 0.9}


class Machine:
    """A machine whose speed is the product of known factors, and whose memory holds 8 pairs."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.tried: list[list[str]] = []
        self.seconds, self.time = seconds, 0.0

    def __call__(self, args, seconds, limit) -> Trial:
        self.tried.append(list(args))
        self.time += self.seconds
        options = dict(arg.split("=") for arg in args)
        batch = int(options.get("--data.init_args.batch_size", 2))
        if batch > 8:
            return Trial(why="out of memory")
        speed = 10.0 * (1 + 0.2 * (batch > 2) + 0.2 * (batch > 4))
        for arg in args:
            speed *= SPEED.get(".".join(arg.split(".")[-1:]), 1.0)
        return Trial(speed, memory=0.5 * batch, config=CONFIG)


@pytest.fixture
def machine(monkeypatch) -> Machine:
    monkeypatch.setattr("lssl.cli.tune._cores", lambda: 4)
    monkeypatch.setattr("shutil.which", lambda name: name)
    return Machine()


def test_what_helps_is_kept(machine):
    tuner = Tuner(["--config=x"], 1000.0, machine, lambda: machine.time)
    lines = list(tuner.lines())
    assert tuner.kept == {
        "backbone.channels_last": True,
        "trainer.precision": "bf16-mixed",
        "data.init_args.batch_size": 8,
    }
    assert tuner.best.pairs_per_second == pytest.approx(10 * 1.5 * 2 * 1.4)
    by_name = {line[:32].strip(): line[32:].split(maxsplit=3) for line in lines}
    assert by_name["present settings"] == ["10", "1.00", "1.00"]
    assert by_name["channels_last true"] == ["15", "1.50", "1.00", "kept"]
    assert by_name["fused true"] == ["15.6", "1.56", "1.00"]  # 1.04 times the best so far is noise
    assert by_name["precision bf16-mixed"] == ["30", "3.00", "1.00", "kept, changes the method"]
    assert by_name["batch_size 8"] == ["42", "4.20", "4.00", "kept, changes the method"]
    assert by_name["batch_size 16"] == ["-", "-", "-", "out of memory"]
    assert "batch_size 32" not in by_name
    assert {"num_workers 2", "num_workers 3", "compile true"} <= by_name.keys()
    assert by_name["checkpointing true"][-1] == "for memory, not for speed"
    advice = tuner.advice()
    same, other = advice.split("Faster, but another method")
    assert "--backbone.channels_last true\n" in same
    assert "--trainer.precision bf16-mixed --data.init_args.batch_size 8\n" in other
    assert "backbone: {channels_last: true}" in same
    assert all("--trainer.precision=bf16-mixed" in args for args in machine.tried[-1:])


def test_no_trial_begins_too_late(machine):
    tuner = Tuner([], 2.5, machine, lambda: machine.time)
    list(tuner.lines())
    assert len(machine.tried) == 3  # at 0 and 1 seconds, and the present settings again at 2
    assert re.search(r"No time for num_workers 2, .*checkpointing true: raise --minutes", tuner.advice())


def test_a_machine_that_has_become_faster_is_no_gain():
    """Every trial is 1.2 times as fast as the one before, whatever its settings."""
    speeds = iter(1.2**number for number in range(100))
    tuner = Tuner([], 9e9, lambda *_: Trial(next(speeds), config=CONFIG))
    list(tuner.lines())
    assert tuner.kept == {}


def test_settings_that_do_not_work_at_all_are_an_error():
    tuner = Tuner([], 9.0, lambda *_: Trial(why="the data are gone"))
    with pytest.raises(Exception, match="The present settings do not work: the data are gone"):
        list(tuner.lines())


def test_a_trial_trains_some_steps(tmp_path):
    """In this process; the second one does not work."""
    recipe = ["--config", str(ROOT / "configs/longitudinal_infonce.yaml"), *tiny(tmp_path, backbone=TINY_NET)]
    (tmp_path / "a").mkdir()
    measure([*recipe, "--trainer.devices=7"], str(tmp_path / "a"), 0.0)
    trial = Trial(**json.loads((tmp_path / "a/trial.json").read_text()))
    assert trial.why == ""
    assert 0.01 < trial.pairs_per_second < 1000
    assert 0.1 < trial.memory < 100
    assert trial.config["data"]["init_args"]["batch_size"] == 2
    measure([*recipe, "--views.size=40"], str(tmp_path), 0.0)
    assert "not divisible by 16" in json.loads((tmp_path / "trial.json").read_text())["why"]


@pytest.mark.slow
def test_a_trial_in_a_process_of_its_own(tmp_path):
    recipe = ["--config", str(ROOT / "configs/longitudinal_infonce.yaml"), *tiny(tmp_path, backbone=TINY_NET)]
    assert try_settings(recipe, 0.0, 300.0).pairs_per_second > 0
    assert "no option 'fuzed'" in try_settings([*recipe, "--model.init_args.fuzed=1"], 0.0, 300.0).why
    assert try_settings(recipe, 0.0, 0.1).why == "not done within 0 s"


def test_a_trial_whose_folder_is_gone_ends_without_a_word(tmp_path, capfd):
    """As when Ctrl-C comes while the process is made: it had ended in a traceback below `lssl tune`'s sentence."""
    process = get_context("fork").Process(target=measure, args=([], str(tmp_path / "gone"), 1, True))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert "".join(capfd.readouterr()) == ""


def test_its_options_are_checked_and_completed(capsys):
    assert "--minutes is -1" in sentence(capsys, "tune", "--config", "demo", "--minutes", "-1")
    assert {"--minutes", "--config", "--views.size"} <= {*words()[1]["tune"]}
