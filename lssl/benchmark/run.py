"""Runs cells in parallel, each in its own process; a failed cell does not stop the others; without torch."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lssl.benchmark.fingerprints import cell_inputs
from lssl.benchmark.output_folder import mark_done, read_done, reset, writing
from lssl.benchmark.plan import Cell, Plan
from lssl.utils.files import write_json

__all__ = ["BenchmarkOutcome", "environment", "last_line", "run_cells"]

LOG, INPUTS = "log.txt", "inputs.json"
POLL = 0.1  # seconds
PROGRAM = (sys.executable, "-m", "lssl")


@dataclass
class BenchmarkOutcome:
    """The outcome of the cells, by name.

    Attributes:
        kept: finished before.
        finished: finished now.
        failed: with the last line of the log.
        skipped: with the pretraining that failed.
    """

    kept: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


OnProgress = Callable[[str, Sequence[str], BenchmarkOutcome], None]


@dataclass
class _Running:
    """A cell at one of its commands."""

    cell: Cell
    commands: list[list[str]]
    log: IO[bytes]
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    seconds: list[float] = field(default_factory=list)


def run_cells(
    plan: Plan,
    fingerprints: dict[str, str],
    jobs: int = 1,
    lock: int | None = None,
    tell: OnProgress = lambda event, running, outcome: None,
    program: Sequence[str] = PROGRAM,
) -> BenchmarkOutcome:
    """Runs all cells that are not finished yet, pretraining before what starts from it.

    Args:
        plan: the cells.
        fingerprints: by cell.
        jobs: how many run at a time.
        lock: file descriptor that the processes inherit, so that the folder stays claimed while any of them lives.
        tell: called with an event in words, the names of what runs, and the outcome so far.
        program: prefix of each command.
    """
    pool = _Pool(plan, fingerprints, jobs, lock, tell, program)
    try:
        while pool.advance():
            time.sleep(POLL)
    finally:
        pool.stop()
    return pool.outcome


class _Pool:
    """Waiting and running cells, and the outcome of the others."""

    def __init__(
        self,
        plan: Plan,
        fingerprints: dict[str, str],
        jobs: int,
        lock: int | None,
        tell: OnProgress,
        program: Sequence[str],
    ) -> None:
        self.plan, self.fingerprints, self.jobs, self.lock, self.tell, self.program = (
            plan,
            fingerprints,
            jobs,
            lock,
            tell,
            program,
        )
        self.outcome = BenchmarkOutcome(
            kept=[cell.name for cell in plan.cells if read_done(cell, fingerprints[cell.name])]
        )
        self.waiting = [cell for cell in plan.cells if cell.name not in self.outcome.kept]
        self.running: list[_Running] = []
        self.env = environment(plan.path.parent, jobs)

    def advance(self) -> bool:
        """Starts cells that can start and records those that ended; False when nothing is left."""
        for cell in self._ready()[: self.jobs - len(self.running)]:
            self._begin(cell)
        for task in list(self.running):
            status = _ended(task)
            if status == 0 and task.commands:
                self._launch(task)
            elif status is not None:
                self._settle(task, status)
        for cell in [cell for cell in self.waiting if cell.needs in self.outcome.failed]:
            self.waiting.remove(cell)
            self.outcome.skipped[cell.name] = str(cell.needs)
        return bool(self.waiting or self.running)

    def stop(self) -> None:
        """Ends running cells and their workers at once."""
        for task in self.running:
            if task.process is not None and task.process.returncode is None:
                os.killpg(task.process.pid, signal.SIGKILL)
                task.process.wait()
            task.log.close()

    def _ready(self) -> list[Cell]:
        there = {None, *self.outcome.kept, *self.outcome.finished}
        return [cell for cell in self.waiting if cell.needs in there]

    def _begin(self, cell: Cell) -> None:
        self.waiting.remove(cell)
        with writing(self.plan.out):
            reset(cell)
            write_json(cell.folder / INPUTS, cell_inputs(self.plan, cell))
            task = _Running(cell, cell.commands(), (cell.folder / LOG).open("wb"))
        self.running.append(task)
        self._launch(task)
        self.tell(f"began {cell.name}", self._names(), self.outcome)

    def _launch(self, task: _Running) -> None:
        command = task.commands.pop(0)
        task.log.write(f"$ lssl {' '.join(command)}\n".encode())
        task.log.flush()
        task.began = time.perf_counter()
        task.process = subprocess.Popen(
            [*self.program, *command],
            stdin=subprocess.DEVNULL,
            stdout=task.log,
            stderr=subprocess.STDOUT,
            env=self.env,
            pass_fds=() if self.lock is None else (self.lock,),
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )

    def _settle(self, task: _Running, status: int) -> None:
        self.running.remove(task)
        task.log.close()
        cell, log = task.cell, task.cell.folder / LOG
        if status == 0:
            with writing(self.plan.out):
                mark_done(cell, self.fingerprints[cell.name], task.seconds)
            self.outcome.finished.append(cell.name)
            event = f"finished {cell.name} in {sum(task.seconds):.0f} s"
        else:
            self.outcome.failed[cell.name] = last_line(log)
            event = f"FAILED {cell.name}: {last_line(log)} ({log})"
        self.tell(event, self._names(), self.outcome)

    def _names(self) -> list[str]:
        return [task.cell.name for task in self.running]


def environment(beside: Path, jobs: int) -> dict[str, str]:
    """Environment of the processes: user files beside the plan can be imported, and the jobs share the cores."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    paths = [str(beside.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def last_line(log: Path) -> str:
    """Why a cell failed, from one line of its log."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("lssl: error: ") if lines else "no output"


def _ended(task: _Running) -> int | None:
    """Exit status of a process that is over, with its time noted."""
    status = task.process.poll() if task.process else None
    if status is not None:
        task.seconds.append(time.perf_counter() - task.began)
    return status


_LIBC: Any = ctypes.CDLL(None) if sys.platform.startswith("linux") else None


def _die_with_parent() -> None:
    """Runs in the child, so that the kernel ends it when the benchmark is killed."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
