"""``lssl show``: what runs logged, as tables and curves; without torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lssl.prepare.commands import Parser
from lssl.runs.cost_table import cost_table
from lssl.runs.log import RunLog, better, ordered_kinds, ordered_taps, read_run
from lssl.runs.outputs import read_cost
from lssl.utils.closing import say_next
from lssl.utils.errors import InputError

__all__ = ["show_command", "show_parser"]

ARROWS = {1: "↑", -1: "↓", 0: " "}
TAPS = 4  # columns of a table


def show_parser() -> argparse.ArgumentParser:
    """The options of ``lssl show``."""
    parser = Parser(
        prog="lssl show",
        description="Prints terms and monitors of a run, or compares runs, and draws their curves.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that lssl fit wrote")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the curves (RUN/pictures; of several runs: here, ./show)"
    )
    return parser


def show_command(args: list[str]) -> None:
    """Runs ``lssl show``."""
    chosen = show_parser().parse_args(args)
    runs = [read_run(folder) for folder in chosen.runs]
    if not any(run.curves for run in runs):
        raise InputError(f"{chosen.runs[0]}/metrics.csv holds no figures yet.")
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    tables = _one_run(runs[0]) if len(runs) == 1 else _several_runs(runs)
    for table in tables:
        console.print(table)
    if len(runs) == 1 and (cost := read_cost(runs[0].folder)):
        console.print(cost_table(cost))
    out = chosen.out or (runs[0].folder / "pictures" if len(runs) == 1 else Path("show"))
    from lssl.runs.curves import draw_monitors, draw_terms

    for draw, name in ((draw_terms, "terms.png"), (draw_monitors, "monitors.png")):
        if draw(runs, out / name):
            console.print(f"curves  {out / name}", soft_wrap=True)
    config = runs[0].folder / "config.yaml"
    last = runs[0].folder / "checkpoints" / "last.ckpt"
    evaluate = ["predict", "--config", str(config), "--ckpt_path", "last"]
    say_next(out, *([evaluate] if len(runs) == 1 and config.is_file() and last.is_file() else []))


def _one_run(run: RunLog) -> list[Table]:
    """First, last and best value of every term, then of every kind at every tap."""
    steps = max(int(curve[0][-1]) for curve in run.curves.values())
    group = run.config.get("model")
    model = str(group.get("class_path", "")).rpartition(".")[2] if isinstance(group, dict) else ""
    title = f"{run.name}: " + (f"{model}, " if model else "") + f"up to step {steps}"
    terms = Table("", *("first", "last", "best"), title=title, title_justify="left")
    for column in terms.columns[1:]:
        column.justify = "right"
    for name in _terms([run]):
        terms.add_row(f"{ARROWS[better(name)]} {name}", *_three(run, name))
    tables = [terms]
    kinds, taps = ordered_kinds([run]), ordered_taps([run])
    for start in range(0, len(taps), TAPS):
        part = taps[start : start + TAPS]
        monitors = Table("", *part, title="Held-out subjects: first → last (best)", title_justify="left")
        for kind in kinds:
            cells = (_change(run, f"monitor/{kind}/{tap}") for tap in part)
            monitors.add_row(f"{ARROWS[better(f'monitor/{kind}/')]} {kind}", *cells)
        tables.append(monitors)
    return tables


def _several_runs(runs: Sequence[RunLog]) -> list[Table]:
    """Last value of every term and, best over taps, of every kind, a column for each run."""
    table = Table("last value", title="Runs side by side", title_justify="left")
    for run in runs:
        table.add_column(run.name, justify="right")
    for name in _terms(runs):
        table.add_row(f"{ARROWS[better(name)]} {name}", *(_last(run, name) for run in runs))
    kinds, taps = ordered_kinds(runs), ordered_taps(runs)
    for kind in kinds:
        table.add_section()
        for tap in taps:
            name = f"monitor/{kind}/{tap}"
            if any(name in run.curves for run in runs):
                table.add_row(f"{ARROWS[better(name)]} {kind} {tap}", *(_last(run, name) for run in runs))
    return [table]


def _terms(runs: Sequence[RunLog]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.curves if not name.startswith("monitor/")))


def _three(run: RunLog, name: str) -> tuple[str, str, str]:
    values, best = run.curves[name][1], run.best(name)
    return f"{values[0]:.4g}", f"{values[-1]:.4g}", "" if best is None else f"{best:.4g}"


def _change(run: RunLog, name: str) -> str:
    if name not in run.curves:
        return "–"
    values, best = run.curves[name][1], run.best(name)
    return f"{values[0]:.3g} → {values[-1]:.3g}" + ("" if best is None else f" ({best:.3g})")


def _last(run: RunLog, name: str) -> str:
    return f"{run.curves[name][1][-1]:.4g}" if name in run.curves else "–"
