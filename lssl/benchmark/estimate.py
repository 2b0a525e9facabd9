"""Estimates the time and memory of a plan from a few timed steps of each strategy; without torch."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lssl.benchmark.output_folder import reset
from lssl.benchmark.plan import Cell, Plan
from lssl.benchmark.run import PROGRAM, environment, last_line
from lssl.cli.compose import merged
from lssl.runs.outputs import read_cost
from lssl.utils.errors import InputError

__all__ = ["Timing", "estimate", "time_cells"]

STEPS = 15  # ten to warm up, five timed


@dataclass(frozen=True)
class Timing:
    """Timing of a kind of cell.

    Attributes:
        around: seconds that do not depend on the number of steps: start, report, fine-tuning's one validation,
            and the whole test.
        step: seconds of a step.
        memory: peak of the process in GB.
    """

    around: float
    step: float
    memory: float

    def seconds(self, cell: Cell) -> float:
        """Of a whole cell."""
        return self.around + self.step * cell.steps


def time_cells(plan: Plan, jobs: int, program: Sequence[str] = PROGRAM) -> Iterator[tuple[str, Timing]]:
    """Timing of each strategy's pretraining, and of each task's fine-tuning, one for all strategies; see :func:`kind`.

    Each runs alone, in a temporary folder. Validation during pretraining is not counted.
    """
    timed = set()
    for cell in plan.cells:
        name = kind(cell)
        if name not in timed and (cell.stage == "pretrain" or cell.needs is None):
            timed.add(name)
            yield name, _time(plan, cell, jobs, program)


def kind(cell: Cell) -> str:
    """What cells that take equally long have in common, as it is shown."""
    if cell.stage == "pretrain":
        return cell.strategy
    return f"fine-tuning, {cell.task}" if cell.task else "fine-tuning"


def estimate(cells: Sequence[Cell], timings: dict[str, Timing], jobs: int) -> tuple[float, float]:
    """Hours of some cells that run in parallel, and GB of memory."""
    by_cell = [timings[kind(cell)] for cell in cells]
    seconds = sum(timing.seconds(cell) for cell, timing in zip(cells, by_cell, strict=True))
    largest = sorted((timing.memory for timing in by_cell), reverse=True)
    return seconds / 3600 / max(1, min(jobs, len(cells))), sum(largest[:jobs])


def _time(plan: Plan, cell: Cell, jobs: int, program: Sequence[str]) -> Timing:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cell"
        steps = min(STEPS, cell.steps)
        short: dict[str, Any] = {"trainer": {"max_steps": steps, "default_root_dir": str(path / "run")}}
        if cell.stage == "finetune":  # validated once at the end, like the whole cell
            short["data"] = {"init_args": {"few_shot": {"steps": steps}}}
            if cell.task:
                short["trainer"]["val_check_interval"] = steps
        trial = replace(cell, folder=path, config=merged(cell.config, short))
        reset(trial)
        log = trial.folder / "log.txt"
        env = {**environment(plan.path.parent, jobs), "WANDB_MODE": "disabled"}
        began = time.perf_counter()
        for command in trial.commands():
            with log.open("ab") as file:
                done = subprocess.run(
                    [*program, *command], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=env
                )
            if done.returncode:
                raise InputError(f"The first steps of {cell.name} failed: {last_line(log)}")
        seconds = time.perf_counter() - began
        cost = read_cost(trial.run)
        if cost is None:  # the program wrote no cost
            return Timing(seconds, 0.0, 0.0)
        step = cost.ms_per_step / 1000
        return Timing(max(0.0, seconds - step * cost.steps), step, cost.memory)
