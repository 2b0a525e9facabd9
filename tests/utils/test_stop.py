"""Workers end with their parent, also if it is killed, and within a long computation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from lssl.utils.files import process_runs

PARENT = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from lssl.utils.stop import end_with_parent
from {module} import {work}

if __name__ == "__main__":
    with ProcessPoolExecutor(2, get_context("spawn"), end_with_parent, (os.getpid(),)) as pool:
        [pool.submit({work}, {argument}) for _ in range(2)]
        while len(pool._processes) < 2:
            time.sleep(0.01)
        pool.submit(os.getpid)
        print(*pool._processes, flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize(
    ("module", "work", "argument"),
    [("time", "sleep", "600"), pytest.param("math", "factorial", "3 * 10**6", marks=pytest.mark.slow)],
)
def test_workers_end_with_a_killed_parent(tmp_path, module, work, argument):
    """The factorial is one call that keeps the interpreter's lock for minutes."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(module=module, work=work, argument=argument))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        time.sleep(3)  # the workers have started their work
        assert all(process_runs(pid) for pid in workers)
        parent.send_signal(signal.SIGKILL)
    end = time.monotonic() + 60
    while any(running(pid) for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.1)


READER = """
import os
import time
import numpy as np
from lssl.data.loading import PairDataset, pair_loader

def hang(*_):
    print(os.getpid(), flush=True)
    time.sleep(600)

one = np.zeros(1)
data = PairDataset(hang, np.zeros((4, 2), int), one, one, one)
batches = iter(pair_loader(data, 1, 2))
time.sleep(60)
"""


def test_a_worker_within_a_read_ends_with_a_killed_run(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(READER)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        assert parent.pid not in workers
        parent.send_signal(signal.SIGKILL)
    end = time.monotonic() + 20
    while any(running(pid) for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.1)


def running(pid: int) -> bool:
    """A killed orphan may stay as a zombie where nobody collects it."""
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return process_runs(pid) and not os.path.isdir("/proc/self")
