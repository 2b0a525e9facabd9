"""A signal to a command and all its workers, as SLURM, `timeout` and a terminal send it: one sentence, none is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from helpers import TINY_NET

LIMIT = 200  # seconds
SMALL = {
    "views": {"size": 32},
    "backbone": TINY_NET,
    "monitor": {"every": 0},
    "trainer": {
        "max_steps": 100000,
        "precision": "32-true",
        "accelerator": "cpu",
        "log_every_n_steps": 1,
        "callbacks": None,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    },
    "data": {"init_args": {"num_workers": 2, "source_size": None, "split": [0.5, 0.25, 0.25]}},
}


def begin(args: list[str], log: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        command = [sys.executable, "-m", "lssl", *args]
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, env=environment)


def wait_until(true, process: subprocess.Popen) -> None:
    end = time.monotonic() + LIMIT
    while not true():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


def members(group: int) -> list[int]:
    """Processes of a group that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        found += [int(path.parent.name)] if int(of) == group and state != "Z" else []
    return found


def knock(process: subprocess.Popen, number: int, times: int, log: Path) -> str:
    """Sends a signal to the whole group; what the command has said when all have ended."""
    for _ in range(times):
        os.killpg(process.pid, number)
        time.sleep(0.5 if times > 1 else 0)
    process.wait(60)
    end = time.monotonic() + 60
    while members(process.pid):
        assert time.monotonic() < end, "processes are left"
        time.sleep(0.1)
    text = log.read_text()
    assert process.returncode in (128 + number, -number), text  # a second Ctrl-C may find Python at its end
    for word in ("Traceback", "Error", "Exception", "killed by signal"):
        assert word not in text
    return text


SLOW = """
import time
from contextlib import suppress
from pathlib import Path


class Slow:
    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __call__(self, visit):
        Path(f"read-{visit.session}").touch()
        time.sleep(self.seconds)
        return visit
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Begins commands in tmp_path, and ends what is left of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow.py").write_text(SLOW)
    begun = []

    def one(*args: str) -> tuple[subprocess.Popen, Path]:
        begun.append(begin(list(args), tmp_path / "log"))
        return begun[-1], tmp_path / "log"

    yield one
    for process in begun:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def training(command: str, folder: Path, cohort: Path, seconds: float) -> list[str]:
    """Reading each visit takes so many seconds."""
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    slow = f'{{"class_path": "slow.Slow", "init_args": {{"seconds": {seconds}}}}}'
    shipped = ["--config", "longitudinal_infonce", "--data", str(cohort), "--config", "small.yaml"]
    return [command, *shipped, f"--data.init_args.transform={slow}"]


def has_read(folder: Path) -> bool:
    return any(folder.glob("read-*"))


@pytest.mark.slow  # tests/utils/test_stop.py has workers in a group, tests/callbacks/test_autosave.py runs that save
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_within_an_epoch_the_run_is_saved(tmp_path, start, cohort, number):
    rows = tmp_path / "runs" / "longitudinal_infonce" / "metrics.csv"
    process, log = start(*training("fit", tmp_path, cohort, 0.05))
    wait_until(lambda: rows.is_file() and len(rows.read_text().splitlines()) > 2, process)
    assert len(members(process.pid)) >= 3
    text = knock(process, number, 1, log)
    assert (rows.parent / "checkpoints" / "last.ckpt").is_file()
    assert text.count("Stopped by") == 1
    assert "Go on with: lssl fit" in text


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGINT, 2)])
@pytest.mark.parametrize("ready", [False, True])
def test_with_workers_but_before_the_first_step_one_sentence(tmp_path, start, cohort, command, number, times, ready):
    """Workers have just been forked, or read."""
    process, log = start(*training(command, tmp_path, cohort, 5))
    wait_until(lambda: has_read(tmp_path) if ready else len(members(process.pid)) > 1, process)
    text = knock(process, number, times, log)
    assert text.count("lssl: stopped by") == 1
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [2.0, 3.0, 5.0])
def test_while_libraries_are_imported(tmp_path, start, cohort, seconds):
    process, log = start(*training("fit", tmp_path, cohort, 5))
    time.sleep(seconds)
    assert "lssl: stopped by SIGTERM." in knock(process, signal.SIGTERM, 1, log)


@pytest.fixture
def cohort(tmp_path):
    """Twelve subjects of two visits."""
    draw = np.random.default_rng(0)
    inside = np.linalg.norm(np.mgrid[:40, :40, :40] - 19.5, axis=0) < 15
    for subject in range(12):
        for session in ("M00", "M12"):
            path = tmp_path / f"bids/sub-{subject}/ses-{session}/anat/sub-{subject}_ses-{session}_T1w.nii.gz"
            path.parent.mkdir(parents=True)
            voxels = (100 * inside * draw.random(inside.shape)).astype(np.int16)
            nib.save(nib.Nifti1Image(voxels, np.diag([4.0, 4.0, 4.0, 1.0])), path)
    return tmp_path / "bids"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGINT, 2)])
def test_prepare_goes_on_afterwards(tmp_path, start, cohort, number, times):
    for subject in range(4, 12):
        shutil.rmtree(cohort / f"sub-{subject}")
    out = tmp_path / "out"
    command = ["prepare", str(cohort), str(out), "--workers", "2"]
    process, log = start(*command)
    wait_until(lambda: list((out / "records").glob("*.json")), process)
    text = knock(process, number, times, log)
    assert text.count("lssl: stopped by") == 1
    assert "A worker was killed" not in text
    again, log = start(*command)
    assert again.wait(LIMIT) == 0, log.read_text()
    assert len((out / "visits.csv").read_text().splitlines()) == 9


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", [["benchmark", "--config", "benchmark/demo"], ["tune", "--config", "demo"]])
def test_commands_that_start_others_end_them(tmp_path, start, command, number):
    out = ["--out", str(tmp_path / "bench")] if command[0] == "benchmark" else []
    process, log = start(*command, *out)

    def others() -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                mine = (
                    f"PWD={tmp_path}\0".encode() in path.read_bytes() or Path(path.parent, "cwd").resolve() == tmp_path
                )
            except OSError:
                continue
            found += [int(path.parent.name)] if mine and int(path.parent.name) not in (process.pid, os.getpid()) else []
        return found

    wait_until(others, process)
    time.sleep(8)  # the other process runs a while
    text = knock(process, number, 1, log)
    assert text.count("lssl: stopped by") == 1
    end = time.monotonic() + 60  # a server that imports ends when it has
    while others():
        assert time.monotonic() < end
        time.sleep(0.2)
