"""From finished cells to one tidy table, the learning rate of each row, and its paired differences; without torch.

``results.csv`` has a row per value: ``stage, strategy, seed, labelled, budget, learning_rate, chosen, subject, session,
structure, metric, value``. Scores of test subjects come from the cell's ``test/segmentation.csv``; figures of a whole
cell have no subject: ``val_dice``, ``parameters``, ``ms_per_step``, ``pairs_per_second``, ``hours`` (of ``lssl fit``),
``memory`` and ``device_memory`` (GB, at most), and of a pretraining ``rank/<tap>``, ``retrieval/<tap>`` and so on, as
its report has them, beside ``untrained/…``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lssl.benchmark.output_folder import read_done
from lssl.benchmark.plan import SCRATCH, Cell, Plan
from lssl.benchmark.statistics import Difference, paired
from lssl.runs.outputs import read_cost, read_report, read_scores
from lssl.utils.errors import InputError

__all__ = ["Result", "by_subject", "choose", "collect", "entries"]

COLUMNS = ["stage", "strategy", "seed", "labelled", "budget", "learning_rate"]
VALUES = ["subject", "session", "structure", "metric", "value"]
ROW = ["strategy", "labelled", "budget"]


@dataclass(frozen=True)
class Result:
    """A row of the comparison: a strategy at a number of labelled subjects and a budget, at its chosen learning rate.

    Attributes:
        strategy: its name.
        labelled: number of labelled subjects, as text; ``all``.
        budget: its name.
        rate: learning rate that the validation subjects chose.
        dice: seeds × test subjects.
        means: metric → mean over seeds, subjects and structures.
        structures: structure → mean Dice.
        hours: of fine-tuning one seed; pretraining apart.
        pretraining_hours: of pretraining one seed.
        difference: of Dice to scratch at the same budget and labels; ``None`` for scratch itself.
        equal: the budget of the scratch row of equal total compute, and the difference to it.
    """

    strategy: str
    labelled: str
    budget: str
    rate: float
    dice: pd.DataFrame
    means: dict[str, float]
    structures: dict[str, float]
    hours: float
    pretraining_hours: float
    difference: Difference | None = None
    equal: tuple[str, Difference] | None = None

    @property
    def validation(self) -> float:
        """Mean validation Dice."""
        return self.means["val_dice"]


def collect(plan: Plan, fingerprints: dict[str, str]) -> pd.DataFrame:
    """All values of all finished cells, tidy."""
    parts = [_cell_table(cell, note) for cell in plan.cells if (note := read_done(cell, fingerprints[cell.name]))]
    if not any(cell.stage == "finetune" and read_done(cell, fingerprints[cell.name]) for cell in plan.cells):
        raise InputError(f"No fine-tuning in {plan.out} is finished, so there is nothing to compare.")
    table = pd.concat(parts, ignore_index=True)
    chosen = choose(table)
    rows = zip(*(table[name] for name in (*ROW, "learning_rate")), strict=True)
    table.insert(len(COLUMNS), "chosen", [chosen.get(tuple(row)) == rate for *row, rate in rows])
    return table


def choose(table: pd.DataFrame) -> dict[tuple[str, str, str], float]:
    """``(strategy, labelled, budget)`` → the rate of the highest mean validation Dice; no test value is looked at.

    One rate for all seeds of a row. Rates of which seeds are missing are no match for those that have all.
    """
    scores = table[(table["metric"] == "val_dice") & (table["stage"] == "finetune")]
    chosen = {}
    for (strategy, labelled, budget), part in scores.groupby(ROW):
        by_rate = part.groupby("learning_rate")["value"].agg(["count", "mean"]).sort_index()
        complete = by_rate[by_rate["count"] == by_rate["count"].max()]
        chosen[str(strategy), str(labelled), str(budget)] = float(complete["mean"].idxmax())
    return chosen


def by_subject(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Seeds × subjects: the mean over structures of the mean over visits or pairs of them."""
    part = scores[(scores["metric"] == metric) & scores["subject"].notna()]
    structures = part.groupby(["seed", "subject", "structure"])["value"].mean()
    return structures.groupby(["seed", "subject"]).mean().unstack("subject")


def entries(table: pd.DataFrame, order: list[str]) -> list[Result]:
    """Rows of the comparison, by labelled subjects and budget, strategies in a given order.

    Args:
        table: of :func:`collect`.
        order: of the strategies.
    """
    tuned = table[table["stage"] == "finetune"]
    hours = table[(table["stage"] == "pretrain") & (table["metric"] == "hours")].groupby("strategy")["value"].mean()
    found = [
        _result((str(a), str(b), str(c)), part, float(hours.get(a, 0.0)))
        for (a, b, c), part in tuned[tuned["chosen"]].groupby(ROW)
    ]
    scratch = [entry for entry in found if entry.strategy == SCRATCH]
    budgets = [*tuned["budget"].unique()]  # as in the plan
    found.sort(key=lambda e: (_number(e.labelled), budgets.index(e.budget), order.index(e.strategy)))
    return [entry if entry.strategy == SCRATCH else _compared(entry, scratch) for entry in found]


def _result(row: tuple[str, str, str], part: pd.DataFrame, pretraining_hours: float) -> Result:
    scores, figures = part[part["subject"].notna()], part[part["subject"].isna()]
    dice = scores[scores["metric"] == "dice"]
    means = {str(metric): float(np.nanmean(by_subject(scores, metric))) for metric in scores["metric"].unique()}
    means |= {str(metric): float(value) for metric, value in figures.groupby("metric")["value"].mean().items()}
    subjects = dice.groupby(["structure", "seed", "subject"], sort=False)["value"].mean()
    structures = {str(name): float(value) for name, value in subjects.groupby("structure", sort=False).mean().items()}
    return Result(
        *row,
        float(part["learning_rate"].iloc[0]),
        by_subject(scores, "dice"),
        means,
        structures,
        means["hours"],
        pretraining_hours,
    )


def _compared(entry: Result, scratch: list[Result]) -> Result:
    """With its differences to scratch: at the same budget, and at no more compute than both stages took.

    Of the scratch rows within that compute, the one that validation subjects prefer is taken.
    """
    alike = [other for other in scratch if other.labelled == entry.labelled]
    same = next((other for other in alike if other.budget == entry.budget), None)
    total = entry.hours + entry.pretraining_hours
    within = [other for other in alike if other.hours <= total or other is same]
    best = max(within, key=lambda other: other.validation, default=None)
    difference = paired(entry.dice, same.dice) if same else None
    equal = paired(entry.dice, best.dice) if best else None
    return dataclasses.replace(entry, difference=difference, equal=(best.budget, equal) if best and equal else None)


def _cell_table(cell: Cell, note: dict) -> pd.DataFrame:
    figures = pd.DataFrame(_figures(cell, note), columns=["metric", "value"])
    parts = [figures]
    if cell.stage == "finetune":
        parts.append(read_scores(cell.run))
    table = pd.concat(parts, ignore_index=True)
    labelled = "" if cell.stage == "pretrain" else "all" if cell.labelled is None else str(cell.labelled)
    rate = np.nan if cell.rate is None else cell.rate
    own: dict[str, Any] = dict(
        zip(COLUMNS, (cell.stage, cell.strategy, cell.seed, labelled, cell.budget, rate), strict=True)
    )
    return table.assign(**own).reindex(columns=[*COLUMNS, *VALUES])


def _figures(cell: Cell, note: dict) -> Iterator[tuple[str, float]]:
    """Of the whole cell."""
    yield "hours", note["seconds"][0] / 3600
    if cost := read_cost(cell.run):
        yield from ((name, value) for name, value in dataclasses.asdict(cost).items() if name != "pairs_per_step")
        if cost.ms_per_step:
            yield "pairs_per_second", 1000 * cost.pairs_per_step / cost.ms_per_step
    if cell.stage == "finetune":
        yield "val_dice", validation_dice(cell)
    if report := read_report(cell.run):
        yield from report.trained.items()
        yield from ((f"untrained/{name}", value) for name, value in report.untrained.items())


def validation_dice(cell: Cell) -> float:
    """At the end of fine-tuning, hence of the weights that were tested."""
    log = pd.read_csv(cell.run / "metrics.csv")
    values = log["val/dice"].dropna().tolist() if "val/dice" in log else []
    if not values:
        raise InputError(f"{cell.run / 'metrics.csv'} holds no val/dice to choose the learning rate by.")
    return float(values[-1])


def _number(labelled: str) -> float:
    return np.inf if labelled == "all" else float(labelled)
