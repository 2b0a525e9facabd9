"""Open files and shared memory of worker processes."""

import resource
import tempfile
from types import SimpleNamespace

import pytest
import torch.multiprocessing

from lssl.utils import workers
from lssl.utils.errors import InputError


@pytest.fixture
def limits(monkeypatch):
    """Set and read without touching this process."""
    state = {"limit": (1024, 4096), "strategy": None}
    monkeypatch.setattr(resource, "getrlimit", lambda _: state["limit"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: state.update(limit=limit))
    monkeypatch.setattr(torch.multiprocessing, "set_sharing_strategy", lambda name: state.update(strategy=name))
    return state


def test_enough_files_are_left_alone(limits):
    workers.check_workers(4, 0)
    assert limits == {"limit": (1024, 4096), "strategy": None}


def test_a_low_limit_is_raised_as_far_as_it_may_be(limits):
    limits["limit"] = (64, 4096)
    workers.check_workers(4, 0)
    assert limits == {"limit": (128 + 4 * 64, 4096), "strategy": None}
    limits["limit"] = (64, 64)
    workers.check_workers(4, 0)
    assert limits == {"limit": (64, 64), "strategy": "file_system"}


def test_without_workers_nothing_is_asked(limits, monkeypatch):
    limits["limit"] = (64, 64)
    monkeypatch.setattr(workers, "_free_shared_memory", lambda: 0)
    workers.check_workers(0, 10**12)
    assert limits["strategy"] is None


def test_shared_memory_is_asked_before_it_is_needed(monkeypatch):
    """Docker's default is 64 MB."""
    room = SimpleNamespace(f_bavail=16384, f_frsize=4096)
    monkeypatch.setattr(workers.os, "statvfs", lambda _: room)
    workers.check_workers(4, 8_000_000)
    with pytest.raises(InputError, match=r"4 workers hold up to 80 MB of batches in /dev/shm, of which 67 MB are free"):
        workers.check_workers(4, 10_000_000)


def test_workers_need_a_folder_for_temporary_files(tmp_path, monkeypatch):
    """Without one, the first batch would be waited for without end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(InputError, match="Set TMPDIR"):
        workers.check_workers(1, 0)
    workers.check_workers(0, 0)
