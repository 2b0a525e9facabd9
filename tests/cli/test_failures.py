"""What ends a training command is one sentence, also if another process of the run met it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from helpers import TINY_NET, fit
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from lssl.cli.failures import explained, stop_launched
from lssl.utils.errors import InputError
from lssl.utils.stop import NoBatch, Stopped, StopSignals


def test_a_process_that_lost_the_others_says_so_in_one_sentence():
    with pytest.raises(InputError, match="Another process of this run"), explained([]):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:31337")
    with pytest.raises(RuntimeError, match="shapes"), explained([]):
        raise RuntimeError("shapes do not match")


def test_a_full_disk_is_one_sentence_and_a_missing_file_is_another_error():
    with pytest.raises(InputError, match=r"metrics\.csv could not be written: the disk is full"), explained([]):
        raise OSError(errno.ENOSPC, "No space left on device", "run/metrics.csv")
    with pytest.raises(FileNotFoundError) as found, explained([]):
        raise FileNotFoundError(errno.ENOENT, "No such file", "scan.nii.gz")
    assert found.value.__cause__ is None  # an error that is its own cause would be followed for ever
    with pytest.raises(ValueError, match="a bug") as found, explained([]):
        raise ValueError("a bug")
    assert found.value.__cause__ is None


def launched(function, temporary) -> None:
    """Two forked processes run a function, as those of ``ddp_fork`` do, with a folder for temporary files."""
    strategy = SimpleNamespace(num_processes=2, cluster_environment=SimpleNamespace(main_port=31337))
    strategy.launcher = launcher = _MultiProcessingLauncher(strategy, "fork")
    trainer = SimpleNamespace(strategy=strategy)
    with patch.object(tempfile, "tempdir", str(temporary)), explained([]), stop_launched(trainer):
        launcher.launch(function)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (InputError("/data/a.nii is damaged."), "/data/a.nii is damaged."),
        (OSError(errno.ENOSPC, "No space", "run/log.csv"), "run/log.csv could not be written: the disk is full."),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), "Another process of this run"),
    ],
)
def test_a_launched_process_says_its_sentence_even_if_temporary_files_cannot_be_written(
    error, sentence, tmp_path, capfd
):
    """Torch would write the traceback there, fail, and print both failures."""

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    both = multiprocessing.get_context("fork").Barrier(2)

    def function():
        both.wait()
        shutil.rmtree(temporary, ignore_errors=True)
        raise error

    with pytest.raises(SystemExit) as end:
        launched(function, temporary)
    assert end.value.code == 2
    said = capfd.readouterr().err
    assert f"lssl: error: {sentence}" in said
    assert "Traceback" not in said


def test_a_bug_in_a_launched_process_keeps_its_traceback(tmp_path):
    def function():
        raise ValueError("a bug")

    with pytest.raises(ProcessRaisedException, match="ValueError: a bug"):
        launched(function, tmp_path)


def test_a_launched_process_that_has_not_begun_to_listen_obeys_a_signal(tmp_path):
    """A forked one has its parent's handlers, which pass over its own signals: it hung, and its parent did, too."""

    def function():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with StopSignals(), pytest.raises(InputError, match="Another process") as ended:
        launched(function, tmp_path)
    assert ended.value.__cause__.signal_name == "SIGTERM"


def test_launched_processes_that_wait_for_a_batch_end_with_the_status_of_the_signal(tmp_path):
    def function():
        raise NoBatch("never comes")

    with pytest.raises(SystemExit) as end:
        launched(function, tmp_path)
    assert end.value.code == 143


def test_no_process_is_launched_where_temporary_files_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="Set TMPDIR"):
        launched(print, tmp_path / "gone")


def test_the_status_of_a_spawned_process_is_that_of_the_run():
    with pytest.raises(SystemExit) as stop, explained([]):
        raise ProcessExitedException("process 0 terminated with exit code 143", 0, 31337, 143)
    assert stop.value.code == 143
    with pytest.raises(InputError, match="Another process"), explained([]):
        raise ProcessExitedException("process 1 terminated with signal SIGKILL", 1, 31337, -9, "SIGKILL")


def test_a_signal_reaches_the_spawned_processes():
    class Launcher(_MultiProcessingLauncher):
        sent: list[int] = []  # noqa: RUF012

        def __init__(self) -> None:
            pass

        def kill(self, signum):
            self.sent.append(signum)

    launcher = Launcher()
    trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
    with pytest.raises(Stopped), stop_launched(trainer):
        raise Stopped(signal.SIGINT)
    assert launcher.sent == [signal.SIGTERM]
    with pytest.raises(Stopped), stop_launched(SimpleNamespace(strategy=SimpleNamespace(launcher=None))):
        raise Stopped(signal.SIGINT)


def test_a_run_can_be_sent_to_spawned_processes(tmp_path, monkeypatch):
    """Lock, files to close and the state of generators stay here: torch sends the latter as a file that is gone."""
    found = {}

    def launch(self, function, *args, trainer=None, **kwargs):
        found["task"], found["trainer"] = pickle.loads(pickle.dumps((trainer.lightning_module, trainer)))
        raise SystemExit(0)

    monkeypatch.setattr(_MultiProcessingLauncher, "launch", launch)
    options = ["--trainer.strategy=ddp_spawn", "--trainer.devices=2"]
    with pytest.raises(SystemExit):
        fit(tmp_path, "demo.yaml", options=options, backbone=TINY_NET)
    held = [vars(callback) for callback in found["trainer"].callbacks]
    locks = [values[name] for values in held for name in ("lock", "claim") if name in values]
    assert locks == [None, None]
    assert pickle.dumps(found["task"].generator) == pickle.dumps(type(found["task"].generator)().manual_seed(5))
