"""``lssl benchmark``: its options, and what it prints."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lssl.benchmark.fingerprints import cell_fingerprints
from lssl.benchmark.output_folder import claimed, read_done
from lssl.benchmark.plan import Cell, Plan, read_plan
from lssl.benchmark.run import BenchmarkOutcome, OnProgress, run_cells
from lssl.utils.closing import say_next
from lssl.utils.errors import InputError
from lssl.utils.stop import Stopped

__all__ = ["benchmark_command", "benchmark_parser"]


def benchmark_parser() -> argparse.ArgumentParser:
    """The options of ``lssl benchmark``."""
    from lssl.prepare.commands import Parser

    parser = Parser(
        prog="lssl benchmark",
        description="Pretrains, fine-tunes and tests every strategy of a plan on the same network, data and budget.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="NAME", help="the plan; benchmark/demo is one")
    add(
        "--data",
        metavar="PATH",
        help="a prepared folder, a BIDS folder or a table of visits, instead of the plan's own",
    )
    add("--out", type=Path, metavar="DIR", help="instead of the plan's own out")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="cells side by side (1); with --slurm, at most so many at a time",
    )
    add("--dry-run", action="store_true", help="show cells, commands, time and memory, and run none")
    add("--report", action="store_true", help="write report.html, too: tables, curves and pictures in one file")
    add("--slurm", action="store_true", help="run the cells as SLURM arrays (pip install 'lssl[slurm]')")
    return parser


def benchmark_command(args: list[str]) -> None:
    """Runs ``lssl benchmark``; failed cells end it with status 1, a signal with its own."""
    from lssl.cli.compose import find_config

    chosen = benchmark_parser().parse_args(args)
    if chosen.jobs < 1:
        raise InputError(f"--jobs is {chosen.jobs}; at least one process is needed.")
    plan = read_plan(find_config(chosen.config), chosen.out, chosen.data)
    if plan.note:
        print(plan.note)
    fingerprints = cell_fingerprints(plan)
    if chosen.dry_run:
        _show(plan, fingerprints, chosen.jobs)
        say_next(None, ["benchmark", *(arg for arg in args if arg != "--dry-run")])
    else:
        _run(plan, fingerprints, chosen, args)


def _run(plan: Plan, fingerprints: dict[str, str], chosen: Any, args: list[str]) -> None:
    with claimed(plan) as lock, _interruptible(plan, fingerprints):
        pending = [cell for cell in plan.cells if read_done(cell, fingerprints[cell.name]) is None]
        print(f"{plan.out}: {len(plan.cells)} cells, {len(plan.cells) - len(pending)} finished before.")
        if pending:
            from lssl.benchmark.checks import check_cells

            check_cells(plan, pending)
        with _live(len(plan.cells)) as tell:
            if chosen.slurm:
                from lssl.benchmark.slurm import run_on_slurm

                outcome = run_on_slurm(plan, fingerprints, chosen.jobs, tell)
            else:
                outcome = run_cells(plan, fingerprints, chosen.jobs, lock, tell)
        _say(outcome)
        if any(cell.stage == "finetune" and read_done(cell, fingerprints[cell.name]) for cell in plan.cells):
            from lssl.benchmark.report import write_results

            print("Results:", ", ".join(str(path) for path in write_results(plan, fingerprints, chosen.report)))
    again = [] if chosen.report and not outcome.failed else [["benchmark", *args, *["--report"] * (not chosen.report)]]
    say_next(plan.out, *again)
    if outcome.failed:
        raise SystemExit(1)


def _show(plan: Plan, fingerprints: dict[str, str], jobs: int) -> None:
    """Shows the plan without running it, with the commands of the first cell of each kind."""
    from lssl.benchmark.checks import check_cells
    from lssl.benchmark.estimate import estimate, time_cells

    pending = [cell for cell in plan.cells if read_done(cell, fingerprints[cell.name]) is None]
    print(f"{plan.out}: {len(plan.cells)} cells, {len(plan.cells) - len(pending)} of them finished.\n")
    for cell in plan.cells:
        print(f"{'        ' if cell in pending else 'finished'}  {cell.name}  ({cell.steps} steps)")
    print("\nCommands (of the first pretraining and the first fine-tuning; the others are alike):")
    for cell in _first(plan.cells):
        for command in cell.commands():
            print(f"  lssl {' '.join(command)}")
    differences = plan.differences()
    print("\nWhat differs between the pretrainings, but for the methods' own options:")
    for key, row in differences.items():
        print(f"  {key}: {', '.join(f'{name} {value}' for name, value in row.items())}")
    if not differences:
        print("  nothing")
    if not pending:
        return
    check_cells(plan, pending)
    print("\nTiming a few steps of each strategy …", flush=True)
    timings = {}
    for name, timing in time_cells(plan, jobs):
        timings[name] = timing
        print(
            f"  {name}: {1000 * timing.step:.0f} ms/step, {timing.around:.0f} s around, {timing.memory:.1f} GB",
            flush=True,
        )
    hours, memory = estimate(pending, timings, jobs)
    print(
        f"\nAbout {_span(hours)} and {memory:.1f} GB of memory with --jobs {jobs}, if the machine stays as busy as now."
    )


def _first(cells: Sequence[Cell]) -> list[Cell]:
    stages = {cell.stage: cell for cell in reversed(cells)}
    return [stages[stage] for stage in ("pretrain", "finetune") if stage in stages]


def _span(hours: float) -> str:
    return f"{60 * hours:.0f} minutes" if hours < 2 else f"{hours:.1f} hours"


def _say(outcome: BenchmarkOutcome) -> None:
    parts = [f"{len(outcome.finished)} finished now", f"{len(outcome.kept)} before"]
    parts += [f"{len(outcome.failed)} failed"] if outcome.failed else []
    parts += [f"{len(outcome.skipped)} skipped, as their pretraining failed"] if outcome.skipped else []
    print(f"Cells: {', '.join(parts)}.{' The same command tries the failed ones again.' if outcome.failed else ''}")


@contextlib.contextmanager
def _interruptible(plan: Plan, fingerprints: dict[str, str]) -> Iterator[None]:
    """When a signal stops it, says how many cells are finished."""
    try:
        yield
    except Stopped:
        count = sum(read_done(cell, fingerprints[cell.name]) is not None for cell in plan.cells)
        print(
            f"Interrupted: {count} of {len(plan.cells)} cells are finished; the same command goes on.", file=sys.stderr
        )
        raise


@contextlib.contextmanager
def _live(total: int) -> Iterator[OnProgress]:
    """Progress over cells: a bar in a terminal, a line per event elsewhere."""

    def count(outcome: BenchmarkOutcome) -> int:
        return sum(map(len, (outcome.kept, outcome.finished, outcome.failed, outcome.skipped)))

    if not sys.stdout.isatty():
        yield lambda event, running, outcome: print(f"[{count(outcome)}/{total}] {event}", flush=True)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    ) as bar:
        task = bar.add_task("", total=total)

        def tell(event: str, running: Sequence[str], outcome: BenchmarkOutcome) -> None:
            if not event.startswith("began"):
                bar.console.print(event, markup=False, highlight=False)
            bar.update(task, completed=count(outcome), description=", ".join(running))

        yield tell
