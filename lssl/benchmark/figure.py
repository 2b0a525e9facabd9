"""The figures: scores over labelled subjects, differences to scratch with their intervals, and curves of the losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lssl.benchmark.plan import SCRATCH, Cell
from lssl.benchmark.results import Result
from lssl.utils.files import atomic_write

__all__ = ["draw_curves", "draw_results"]


def draw_results(found: list[Result], strategies: list[str], path: Path) -> None:
    """Draws a row of panels per task: one per budget, and one of all differences to scratch.

    Args:
        found: rows of the comparison.
        strategies: in the order of their colours.
        path: PNG to write.
    """
    budgets = list(dict.fromkeys(entry.budget for entry in found))
    tasks = list(dict.fromkeys(entry.task.name for entry in found))
    rows = [[entry for entry in found if entry.task.name == name] for name in tasks]
    heights = [max(3.9, 1.7 + 0.28 * sum(entry.difference is not None for entry in row)) for row in rows]
    figure = Figure(figsize=(4.2 * len(budgets) + 6.5, sum(heights)), layout="constrained")
    ratios = [*[1.0] * len(budgets), 1.5]
    axes = figure.subplots(len(rows), len(ratios), width_ratios=ratios, height_ratios=heights, squeeze=False)
    for row, entries in zip(axes, rows, strict=True):
        _draw_task(row, entries, budgets, strategies)
    shown: dict[str, Any] = {}
    for axis in axes[:, :-1].flat:  # a row may have but one of the budgets
        handles, names = axis.get_legend_handles_labels()
        shown |= dict(zip(names, handles, strict=True))
    names = [name for name in strategies if name in shown]
    figure.legend(
        [shown[name] for name in names], names, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False
    )
    _save(figure, path)


def _draw_task(axes: np.ndarray, found: list[Result], budgets: list[str], strategies: list[str]) -> None:
    task = found[0].task
    of_task = f"{task.name}, " if task.name else ""
    labels = sorted({entry.labelled for entry in found}, key=lambda text: np.inf if text == "all" else float(text))
    for place, budget in enumerate(budgets):
        _means(axes[place], [entry for entry in found if entry.budget == budget], strategies, labels)
        axes[place].set_title(f"{of_task}budget: {budget}", fontsize=10)
    axes[0].set_ylabel(f"{task.title}, mean ± sd over seeds")
    top = max(1e-3, *(axis.get_ylim()[1] for axis in axes[:-1]))
    for axis in axes[:-1]:
        axis.set_ylim(min(axis.get_ylim()[0] for axis in axes[:-1]), top)
    _forest(axes[-1], [entry for entry in found if entry.difference is not None], strategies)
    better = "" if task.higher else ", lower is better"
    axes[-1].set_title(f"{of_task}{task.title} − scratch, 95 % interval{better}", fontsize=10)


def draw_curves(cells: list[Cell], strategies: list[str], path: Path) -> None:
    """Training losses: pretraining relative to its first value, fine-tuning unscaled."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for cell in cells:
        path_of_log = cell.run / "metrics.csv"
        log = pd.read_csv(path_of_log) if path_of_log.is_file() else pd.DataFrame()
        if "train/loss" not in log:  # a run shorter than its logging interval
            continue
        loss = log[["step", "train/loss"]].dropna()
        first = cell.stage == "pretrain"
        values = loss["train/loss"] / (abs(loss["train/loss"].iloc[0]) if first else 1)
        style = {"color": _colour(cell.strategy, strategies), "linewidth": 1}
        label = ", ".join([*([cell.task] if cell.task else []), cell.strategy, f"seed {cell.seed}"])
        axes[0 if first else 1].plot(loss["step"], values, label=label, **style)
    for axis, title in zip(axes, ("pretraining: loss / first loss", "fine-tuning: loss"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        if axis.lines:
            axis.legend(fontsize=7, frameon=False)
    _save(figure, path)


def _means(axis: Axes, found: list[Result], strategies: list[str], labels: list[str]) -> None:
    for name in strategies:
        mine = [entry for entry in found if entry.strategy == name]
        shift = 0.06 * (strategies.index(name) - (len(strategies) - 1) / 2)
        means = [entry.scores.mean(axis=1) for entry in mine]
        places = [labels.index(entry.labelled) + shift for entry in mine]
        spread = [float(mean.std(ddof=1)) if len(mean) > 1 else 0.0 for mean in means]
        if mine:
            axis.errorbar(
                places,
                [float(mean.mean()) for mean in means],
                spread,
                fmt="o-",
                capsize=2,
                markersize=4,
                label=name,
                color=_colour(name, strategies),
            )
    axis.set_xticks(range(len(labels)), labels)
    axis.set_xlim(-0.5, len(labels) - 0.5)
    axis.set_xlabel("labelled subjects")
    axis.spines[["top", "right"]].set_visible(False)


def _forest(axis: Axes, compared: list[Result], strategies: list[str]) -> None:
    axis.set_visible(bool(compared))
    for place, entry in enumerate(compared):
        if entry.difference is not None:
            colour = _colour(entry.strategy, strategies)
            axis.plot([entry.difference.low, entry.difference.high], [place, place], color=colour)
            axis.plot(entry.difference.mean, place, "o", color=colour, markersize=5)
    axis.axvline(0, color="0.6", linewidth=1)
    names = [f"{entry.strategy}, {entry.labelled}, {entry.budget}" for entry in compared]
    axis.set_yticks(range(len(compared)), names, fontsize=8)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)


def _colour(name: str, strategies: list[str]) -> str | tuple:
    return "0.3" if name == SCRATCH else mpl.colormaps["tab10"](strategies.index(name) % 10)


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as part:
        figure.savefig(part, dpi=110, format="png")
