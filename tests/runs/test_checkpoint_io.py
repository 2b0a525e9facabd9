"""A checkpoint is the old one or the new one, whatever ends the process; a damaged one is never loaded."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lssl.checkpoint import read_checkpoint
from lssl.runs.checkpoint_io import AtomicCheckpointIO
from lssl.utils.errors import InputError
from lssl.utils.files import atomic_write, damage, remove_parts

TENSORS = 12


def content(number: int, size: int = 1000) -> dict:
    return {"number": number, "state_dict": {f"w{i}": torch.full((size,), float(number)) for i in range(TENSORS)}}


def write_for_ever(path: Path, temporary: Path) -> None:
    os.environ["TMPDIR"] = str(temporary)
    torch.set_num_threads(1)
    for number in range(10**6):
        AtomicCheckpointIO().save_checkpoint(content(number, 200_000), path)


def kill_within_a_write(path: Path, temporary: Path, draw: random.Random) -> bool:
    """Starts a writer, kills it with -9 at a random moment of a write; whether it had not finished the file."""
    process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(path, temporary))
    process.start()
    part = path.with_name(f".{path.name}.{os.uname().nodename}.{process.pid}.part")
    try:
        end = time.monotonic() + 60
        while not (path.exists() and part.exists()):
            assert process.is_alive()
            assert time.monotonic() < end
        time.sleep(draw.random() * 0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return part.exists()


def check_kills(folder: Path, trials: int) -> int:
    temporary = Path("/dev/shm" if Path("/dev/shm").is_dir() else folder) / f"lssl-{os.getpid()}"
    temporary.mkdir()
    draw, path, within = random.Random(0), folder / "last.ckpt", 0
    try:
        for _ in range(trials):
            within += kill_within_a_write(path, temporary, draw)
            loaded = AtomicCheckpointIO().load_checkpoint(path)
            assert all((value == loaded["number"]).all() for value in loaded["state_dict"].values())
            remove_parts(folder)
            assert os.listdir(folder) == ["last.ckpt"]
            assert os.listdir(temporary) == []
    finally:
        for left in temporary.iterdir():
            left.unlink()
        temporary.rmdir()
    return within


def test_a_killed_write_leaves_the_earlier_checkpoint(tmp_path):
    assert check_kills(tmp_path, 6)


@pytest.mark.slow
def test_many_killed_writes(tmp_path):
    assert check_kills(tmp_path, 100) > 50


def test_a_flipped_bit_is_never_read_as_a_weight(tmp_path):
    """torch.load itself reads it: the checksums of the archive are compared by us alone."""
    path, bad = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(3), path)
    whole, draw, refused, silent = path.read_bytes(), random.Random(0), 0, 0
    for _ in range(200):
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        bad.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        right = content(3)["state_dict"]
        try:
            loaded = torch.load(bad, weights_only=True)["state_dict"]
            wrong = any(not torch.equal(loaded.get(name, torch.zeros(0)), right[name]) for name in right)
        except Exception:
            wrong = True
        else:
            silent += wrong
        if wrong:
            with pytest.raises((InputError, RuntimeError)):
                AtomicCheckpointIO().load_checkpoint(bad)
            refused += 1
    assert silent > 50
    assert refused >= silent


@pytest.mark.parametrize("length", [0, 100, -1, -3000])
def test_a_truncated_checkpoint_is_refused_and_the_whole_ones_are_offered(tmp_path, length):
    for name in ("best", "last"):
        AtomicCheckpointIO().save_checkpoint(content(1), tmp_path / f"{name}.ckpt")
    last = tmp_path / "last.ckpt"
    last.write_bytes(last.read_bytes()[:length])
    assert damage(tmp_path / "best.ckpt") is None
    for read in (AtomicCheckpointIO().load_checkpoint, read_checkpoint):
        with pytest.raises(InputError, match=r"last\.ckpt is damaged \(.+\); go on with --ckpt_path best\."):
            read(last)
    (tmp_path / "best.ckpt").unlink()
    with pytest.raises(InputError, match="no other checkpoint lies beside it"):
        read_checkpoint(last)


def test_a_write_that_fails_leaves_the_earlier_checkpoint_and_says_why(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(1), path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"larger than files may be here \(ulimit -f\)\. The one before it"):
            AtomicCheckpointIO().save_checkpoint(content(2, 20_000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert AtomicCheckpointIO().load_checkpoint(path)["number"] == 1
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_parts_of_running_processes_and_of_other_hosts_stay(tmp_path):
    with atomic_write(tmp_path / "a") as part:
        part.touch()
        other = tmp_path / ".a.elsewhere.1.part"
        other.touch()
        remove_parts(tmp_path)
        assert part.exists()
        assert other.exists()
        os.utime(other, (0, 0))
        remove_parts(tmp_path)
        assert not other.exists()


def test_from_python(tmp_path):
    """As a plugin of Lightning's Trainer."""

    def trainer(steps: int) -> L.Trainer:
        options = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": tmp_path}
        return L.Trainer(plugins=[AtomicCheckpointIO()], max_steps=steps, enable_checkpointing=False, **options)

    first = trainer(1)
    first.fit(BoringModel())
    path = tmp_path / "a.ckpt"
    first.save_checkpoint(path)
    assert damage(path) is None
    trainer(2).fit(BoringModel(), ckpt_path=path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match="damaged"):
        trainer(3).fit(BoringModel(), ckpt_path=path)
