"""One run at a time in a folder: claimed atomically, taken from the dead alone, changed only after loading."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from lssl.runs import folder as room
from lssl.runs.folder import checkpoint_path, new_run_folder, release, requeued_checkpoint
from lssl.runs.lock import FolderInUse, RunLock, _numbers
from lssl.utils.errors import InputError

FORK = multiprocessing.get_context("fork")


def lock_file(folder: Path, number: int, **changes: object) -> Path:
    """The lock of a run on another host, a minute ago."""
    folder.mkdir(exist_ok=True)
    path = folder / f".run-{number}.lock"
    path.write_text(json.dumps({"machine": "elsewhere 1", "pid": 1, "started": "1", "job": ""} | changes))
    os.utime(path, (time.time() - 60,) * 2)
    return path


def claim_and_hold(folder: Path, start, names, end) -> None:
    start.wait()
    names.put(str(new_run_folder(folder).folder))
    end.wait()


def test_runs_that_start_together_get_folders_of_their_own(tmp_path):
    for trial in range(5):
        start, end, names = FORK.Event(), FORK.Event(), FORK.Queue()
        runs = [FORK.Process(target=claim_and_hold, args=(tmp_path / f"{trial}", start, names, end)) for _ in range(6)]
        for run in runs:
            run.start()
        start.set()
        found = {names.get(timeout=60) for _ in runs}
        end.set()
        for run in runs:
            run.join()
        assert found == {str(tmp_path / f"{trial}{suffix}") for suffix in ("", "-2", "-3", "-4", "-5", "-6")}


def take(folder: Path, start, won) -> None:
    start.wait()
    try:
        lock = RunLock(folder)
    except FolderInUse:
        won.put(0)
        return
    won.put(1)
    time.sleep(1)
    lock.check()


def test_one_alone_takes_the_folder_of_a_dead_run(tmp_path):
    for trial in range(5):
        folder = tmp_path / f"{trial}"
        os.utime(lock_file(folder, 7), (0, 0))
        start, won = FORK.Event(), FORK.Queue()
        runs = [FORK.Process(target=take, args=(folder, start, won)) for _ in range(6)]
        for run in runs:
            run.start()
        start.set()
        assert sum(won.get(timeout=60) for _ in runs) == 1
        for run in runs:
            run.join()
            assert run.exitcode == 0


def test_a_killed_run_of_this_machine_is_dead_at_once(tmp_path):
    start, won = FORK.Event(), FORK.Queue()
    run = FORK.Process(target=take, args=(tmp_path, start, won))
    run.start()
    start.set()
    assert won.get(timeout=60)
    with pytest.raises(FolderInUse, match=f"process {run.pid} on"):
        RunLock(tmp_path)
    os.kill(run.pid, signal.SIGKILL)
    run.join()
    RunLock(tmp_path).release()


def test_another_process_of_the_same_number_is_not_the_run(tmp_path):
    lock = RunLock(tmp_path)
    content = json.loads(lock.path.read_text())
    lock.path.write_text(json.dumps(content | {"started": "1"}))
    other = RunLock(tmp_path)
    with pytest.raises(InputError, match="now belongs to another run"):
        lock.check()
    other.check()


def test_a_run_of_another_host_lives_while_it_gives_signs_of_life(tmp_path, monkeypatch):
    path = lock_file(tmp_path, 1)
    with pytest.raises(FolderInUse, match="process 1 on elsewhere"):
        RunLock(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(FolderInUse):
        RunLock(tmp_path)
    lock_file(tmp_path, 1, job="7")  # requeued, on this node now
    RunLock(tmp_path).release()
    lock_file(tmp_path, 1)
    os.utime(path, (time.time() - 301,) * 2)
    RunLock(tmp_path).release()
    assert _numbers(tmp_path) == []


def test_a_released_lock_leaves_no_empty_folder(tmp_path):
    folder = tmp_path / "runs" / "run"
    RunLock(folder).release()
    assert not folder.parent.exists()
    lock = RunLock(folder)
    (folder / "config.yaml").touch()
    lock.release()
    assert os.listdir(folder) == ["config.yaml"]


@pytest.mark.parametrize("file", ["config.yaml", "config.1.yaml", "metrics.csv", "checkpoints/best.ckpt"])
def test_a_folder_with_anything_of_a_run_is_not_free(tmp_path, file):
    """A failed resume had moved config.yaml away, and the next run overwrote the checkpoints."""
    path = tmp_path / "run" / file
    path.parent.mkdir(parents=True)
    path.touch()
    claim = new_run_folder(tmp_path / "run")
    assert claim.folder == tmp_path / "run-2"
    release(claim)


def saved(path: Path, job: str, when: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"lssl": {"job": job}}, path)
    os.utime(path, (when, when))
    return path


def test_a_requeued_job_resumes_and_another_run_does_not(tmp_path, monkeypatch):
    run, other = tmp_path / "run", tmp_path / "run-2"
    saved(run / "hpc_ckpt_2.ckpt", "5", 1)
    mine = saved(other / "hpc_ckpt_10.ckpt", "7_3", 1)
    saved(other / "hpc_ckpt_9.ckpt", "7_3", 2)
    claim = new_run_folder(run)
    assert (claim.folder.name, claim.checkpoint) == ("run-3", None)
    release(claim)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert requeued_checkpoint(run) is None
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    claim = new_run_folder(run)
    assert (claim.folder, claim.checkpoint) == (other, str(mine))
    release(claim)
    mine.write_bytes(mine.read_bytes()[:-9])
    assert str(requeued_checkpoint(other)).endswith("hpc_ckpt_9.ckpt")


def test_last_is_what_was_saved_last(tmp_path):
    last = saved(tmp_path / "checkpoints" / "last.ckpt", "", 5)
    requeue = saved(tmp_path / "hpc_ckpt_1.ckpt", "7", 4)
    assert checkpoint_path("last", tmp_path) == str(last)
    os.utime(requeue, (6, 6))
    assert checkpoint_path("last", tmp_path) == str(requeue)
    assert checkpoint_path(str(last), tmp_path) == str(last)


def test_a_run_resumes_in_the_folder_of_its_checkpoint_alone(tmp_path):
    last = saved(tmp_path / "run" / "checkpoints" / "last.ckpt", "", 5)
    claim = new_run_folder(tmp_path / "run", str(last))
    assert claim.folder == tmp_path / "run"
    with pytest.raises(FolderInUse):
        new_run_folder(tmp_path / "run", str(last))
    release(claim)
    saved(tmp_path / "other" / "checkpoints" / "last.ckpt", "", 5)
    claim = new_run_folder(tmp_path / "other", str(last))
    assert claim.folder == tmp_path / "other-2"
    release(claim)


def test_other_processes_of_a_run_claim_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(room.rank_zero_only, "rank", 1)
    claim = new_run_folder(tmp_path / "run")
    assert claim.lock is None
    assert not claim.folder.exists()


def test_a_folder_that_another_run_made_anew_is_not_ours(tmp_path):
    lock = RunLock(tmp_path / "run")
    assert not lock.lost
    lock.path.unlink()
    assert lock.lost
    other = RunLock(tmp_path / "run")
    with pytest.raises(InputError, match="now belongs to another run"):
        lock.check()
    lock.release()
    assert not other.lost
    other.check()
    other.release()
