"""One trial of ``lssl tune``: a few steps of ``lssl fit`` in a process of their own; without torch."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import yaml

from lssl.runs.outputs import read_cost
from lssl.utils.errors import input_error
from lssl.utils.stop import end_with_parent

__all__ = ["Trial", "measure", "try_settings"]

RESULT, LOG = "trial.json", "log.txt"
ONE_DEVICE = ("--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto")


@dataclass(frozen=True)
class Trial:
    """What came of some settings.

    Attributes:
        pairs_per_second: 0 if they do not work.
        memory: peak in GB: of the GPU, or of the process on CPUs.
        cuda: whether it ran on a GPU.
        config: all settings, as resolved.
        why: they do not work.
    """

    pairs_per_second: float = 0.0
    memory: float = 0.0
    cuda: bool = False
    config: Any = None
    why: str = ""


def try_settings(args: Sequence[str], seconds: float, limit: float) -> Trial:
    """Runs a trial in a new process, so that one that runs out of memory ends alone.

    Args:
        args: options of ``lssl fit``.
        seconds: how long steps are timed.
        limit: seconds after which the process is ended.
    """
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["lssl.cli.training"])
        resource_tracker.ensure_running()  # it would unblock what is blocked here
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the server imports, and would show where
        forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with tempfile.TemporaryDirectory(prefix="lssl-tune-") as folder:
        process = context.Process(target=measure, args=(list(args), folder, seconds, True))
        process.start()
        try:
            process.join(limit)
            ended = process.exitcode
        finally:
            if process.is_alive():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its workers, too
                process.kill()
                process.join()
        if ended is None:
            return Trial(why=f"not done within {limit:.0f} s")
        path = Path(folder, RESULT)
        if not path.is_file():
            return Trial(why="the system ended it, as when memory runs out" if ended < 0 else f"exit status {ended}")
        return Trial(**json.loads(path.read_text()))


def measure(args: Sequence[str], folder: str, seconds: float, alone: bool = False) -> None:
    """Trains some steps and leaves a :class:`Trial` in the folder.

    Args:
        args: options of ``lssl fit``.
        folder: an empty one.
        seconds: how long steps are timed.
        alone: in a process of its own, whose output goes to a file of the folder.
    """
    if alone:
        os.setpgrp()
        end_with_parent(os.getppid())  # the server that forked it, which ends with `lssl tune`
        try:
            log = os.open(Path(folder, LOG), os.O_WRONLY | os.O_CREAT)
        except FileNotFoundError:  # `lssl tune` was stopped while the server was importing, and took the folder with it
            return
        os.dup2(log, 1)
        os.dup2(log, 2)
    from lssl.callbacks import Pace
    from lssl.cli.start import BRIEF, train

    pace = {"class_path": "lssl.callbacks.Pace", "init_args": {"seconds": seconds}}
    length = ("--trainer.max_steps=1000000", f"--trainer.callbacks={json.dumps(pace)}")
    try:
        trainer = train("fit", [*args, *BRIEF, *ONE_DEVICE, *length, f"--trainer.default_root_dir={folder}"])
        found = next(callback for callback in trainer.callbacks if isinstance(callback, Pace))
        cost = read_cost(Path(folder))
        config = yaml.safe_load(Path(folder, "config.yaml").read_text())
        if not found.pairs_per_second or cost is None:
            result: dict[str, Any] = {"why": "the data end before a step is timed"}
        else:
            memory = cost.device_memory or cost.memory
            figures = {"pairs_per_second": found.pairs_per_second, "memory": memory}
            result = {**figures, "cuda": cost.device_memory > 0, "config": config}
    except Exception as error:  # whatever a setting leads to is its result
        traceback.print_exc()
        result = {"why": _reason(error)}
    Path(folder, RESULT).write_text(json.dumps(result))


def _reason(error: Exception) -> str:
    mistake = input_error(error)
    text = " ".join(str(mistake or error).split())
    if "out of memory" in text or isinstance(error, MemoryError):
        return "out of memory"
    return text if mistake else f"{type(error).__name__}: {text[:160]}"
