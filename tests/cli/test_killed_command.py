"""The real command, killed with -9: resumed, it is the undisturbed run to the bit; a dead rank ends the others."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY_NET, tiny

LIMIT = 400  # seconds


def start(*args: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "lssl", "fit", *args],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def arguments(folder: Path, *options: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    shipped = ["--config", str(ROOT / "configs" / "demo.yaml"), *tiny(folder, backbone=TINY_NET)]
    return [*shipped, "--max_lost=0.001", "--data.init_args.num_workers=1", *options]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + LIMIT
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


def state(run: Path) -> dict:
    kept = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return {name: kept[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}


def equal(first, second) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


@pytest.mark.slow
def test_a_killed_command_resumes_exactly(tmp_path):
    options = ["--trainer.max_steps=16", "--trainer.accumulate_grad_batches=2", "--trainer.check_val_every_n_epoch=3"]
    whole = start(*arguments(tmp_path / "whole", *options))
    assert whole.wait(LIMIT) == 0
    draw = random.Random(os.environ.get("LSSL_SEED", "0"))
    cut = tmp_path / "cut"
    process, last = start(*arguments(cut, *options)), cut / "run" / "checkpoints" / "last.ckpt"
    kills = 0
    for _ in range(3):
        wait_for(last, process)
        if kills:  # it has started again, and goes on
            changed = last.stat().st_mtime_ns
            while last.stat().st_mtime_ns == changed and process.poll() is None:
                time.sleep(0.02)
        time.sleep(draw.uniform(0, 1.0))
        kills += process.poll() is None
        process.kill()
        process.wait()
        process = start("--config", str(cut / "run" / "config.yaml"), "--ckpt_path=last")
    assert process.wait(LIMIT) == 0, process.stderr.read()
    assert kills
    print("kills:", kills)
    assert equal(state(cut / "run"), state(tmp_path / "whole" / "run"))
    assert (cut / "run" / "metrics.csv").read_text() == (tmp_path / "whole" / "run" / "metrics.csv").read_text()


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return found


def runs(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait for whoever collects orphans."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_other_in_a_sentence(tmp_path, killed):
    options = ["--trainer.max_steps=1000", "--trainer.devices=2", "--trainer.strategy=ddp", "--max_lost=null"]
    process = start(*arguments(tmp_path / "two", *options, "--data.init_args.num_workers=0"))
    wait_for(tmp_path / "two" / "run" / "checkpoints" / "last.ckpt", process)
    other = next(pid for pid in children(process.pid) if "lssl" in Path(f"/proc/{pid}/cmdline").read_text())
    began = time.monotonic()
    os.kill((process.pid, other)[killed], signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]  # both ranks write to it, so both have ended
    print(f"ended after {time.monotonic() - began:.1f} s, status {process.returncode}")
    assert process.returncode
    assert not runs(process.pid)
    assert not runs(other)
    # the first rank's observer of Lightning may be quicker: it says so, too, and kills
    assert "lssl: error: Another process of this run has ended" in errors or "terminated with code -9" in errors
    assert "Traceback" not in errors
