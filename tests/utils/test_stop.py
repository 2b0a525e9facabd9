"""Workers end with their parent, also if it is killed, and within a long computation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from lssl.utils.files import process_runs
from lssl.utils.stop import Stopped, StopSignals

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


@pytest.mark.slow
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


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the sender of a signal is not known")
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGINT, signal.SIGUSR1))],
)
def test_a_signal_to_the_group_is_the_parents(tmp_path, number):
    """The parent here ignores it, and ends one worker later."""
    ignored = f"import signal\nsignal.signal({int(number)}, signal.SIG_IGN)"
    ends = "import signal\ninput()\nos.kill(int(input()), signal.SIGTERM)\ntime.sleep(60)"
    script = tmp_path / "parent.py"
    script.write_text(ignored + READER.replace("time.sleep(60)", ends))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, script], text=True, start_new_session=True, **pipes) as parent:
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        os.killpg(parent.pid, number)
        time.sleep(1)
        assert all(map(running, workers))
        print("", workers[0], sep="\n", file=parent.stdin, flush=True)
        end = time.monotonic() + 20
        while running(workers[0]):
            assert time.monotonic() < end
            time.sleep(0.1)
        assert running(workers[1])
        parent.kill()


DROPPED = """
import os, signal, time
from lssl.utils.stop import StopSignals

os.register_at_fork(after_in_parent=lambda: signal.raise_signal(signal.SIGTERM))
with StopSignals():
    if os.fork():
        time.sleep(20)
"""


def test_a_stop_that_python_drops_is_raised_again(tmp_path):
    """What a callback after a fork raises is only printed."""
    (tmp_path / "forks.py").write_text(DROPPED)
    ended = subprocess.run([sys.executable, tmp_path / "forks.py"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 143
    assert ended.stderr.strip() == "lssl: stopped by SIGTERM."


def test_an_error_after_a_stop_is_the_stop():
    """As torch's, of a worker that has got the same signal."""

    def run() -> None:
        with StopSignals():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    with pytest.raises(Stopped) as stop:
        run()
    assert stop.value.code == 143
    with pytest.raises(ValueError, match="own"), StopSignals():
        raise ValueError("own")


def test_a_stop_within_an_import_is_not_caught(tmp_path):
    (tmp_path / "half.py").write_text("import os, signal\ntry:\n    signal.raise_signal(15)\nexcept: pass\n")
    program = "from lssl.utils.stop import StopSignals\nwith StopSignals(): import half\nprint('on')"
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (143, "")
    assert ended.stderr.strip() == "lssl: stopped by SIGTERM."


def running(pid: int) -> bool:
    """A killed orphan may stay as a zombie where nobody collects it."""
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return process_runs(pid) and not os.path.isdir("/proc/self")
