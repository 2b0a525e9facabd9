"""The cells as SLURM arrays, through submitit: all pretraining, then all fine-tuning; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lssl.benchmark.output_folder import read_done
from lssl.benchmark.plan import Cell, Plan
from lssl.benchmark.run import BenchmarkOutcome, OnProgress, run_cells
from lssl.utils.errors import InputError

__all__ = ["run_on_slurm"]


def run_on_slurm(plan: Plan, fingerprints: dict[str, str], jobs: int, tell: OnProgress) -> BenchmarkOutcome:
    """Submits an array per stage, waits for it, and reports the outcome; all nodes must see the folder.

    Args:
        plan: the cells; its ``slurm`` goes to submitit's ``update_parameters`` (``timeout_min`` …).
        fingerprints: by cell.
        jobs: how many run at a time.
        tell: as in :func:`lssl.benchmark.run.run_cells`.
    """
    try:
        import submitit  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise InputError("--slurm needs submitit: pip install 'lssl[slurm]'.") from None
    executor = submitit.AutoExecutor(folder=str(plan.out / "slurm"))
    executor.update_parameters(**{"name": "lssl-benchmark", "slurm_array_parallelism": jobs, **plan.slurm})
    outcome = BenchmarkOutcome(kept=[cell.name for cell in plan.cells if read_done(cell, fingerprints[cell.name])])
    for stage in ("pretrain", "finetune"):
        cells = [cell for cell in plan.cells if cell.stage == stage and cell.name not in outcome.kept]
        ready = [cell for cell in cells if cell.needs not in outcome.failed]
        outcome.skipped |= {cell.name: str(cell.needs) for cell in cells if cell not in ready}
        submitted = executor.map_array(_run_one, [(plan, cell, fingerprints) for cell in ready]) if ready else []
        try:
            for place, (cell, job) in enumerate(zip(ready, submitted, strict=True)):
                _settle(cell, job, outcome)
                why = f"FAILED {cell.name}: {outcome.failed[cell.name]}" if cell.name in outcome.failed else ""
                tell(why or f"finished {cell.name}", [other.name for other in ready[place + 1 :]], outcome)
        except BaseException:  # interrupted: submitted jobs would continue
            for job in submitted:
                job.cancel()
            raise
    return outcome


def _settle(cell: Cell, job: Any, outcome: BenchmarkOutcome) -> None:
    try:
        reason = job.result()
    except Exception as error:  # lost with its node, out of time …
        reason = _reason(error)
    if reason:
        outcome.failed[cell.name] = reason
    else:
        outcome.finished.append(cell.name)


def _reason(error: Exception) -> str:
    """The reason in one line: the last line of the traceback that submitit quotes between two rules."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    rules = [place for place, line in enumerate(lines) if not line.strip("-")]
    return lines[rules[-1] - 1] if rules and rules[-1] else lines[0]


def _run_one(task: tuple[Plan, Cell, dict[str, str]]) -> str:
    """Runs one cell in a job, after its pretraining; returns why it failed, or an empty text."""
    plan, cell, fingerprints = task
    alone: Sequence[Cell] = [replace(cell, needs=None)]
    return run_cells(replace(plan, cells=list(alone)), fingerprints).failed.get(cell.name, "")
