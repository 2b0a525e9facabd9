"""From finished cells to one tidy table, the learning rate of each row, and its paired differences; without torch.

``results.csv`` has a row per value: ``stage, strategy, seed, labelled, budget, learning_rate, chosen, subject, session,
structure, metric, value, cluster``, and second ``task`` if the plan names tasks. Scores of test subjects come from the
cell's test (:func:`lssl.runs.outputs.read_scores`); figures of a whole cell have no subject: ``val_dice`` (or what else
chose the rate), figures of all test subjects such as ``auc``, ``parameters``, ``ms_per_step``, ``pairs_per_second``,
``hours`` (of ``lssl fit``), ``memory`` and ``device_memory`` (GB, at most), and of a pretraining ``rank/<tap>``,
``retrieval/<tap>`` as its report has them, beside ``untrained/…``. Of ``dice_minus_scratch`` (or another score), the
paired mean difference of a row, the columns ``low, high, p, p_holm, ci_method, seeds, clusters`` are filled, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lssl.benchmark.flatness import FALL, loss_fall
from lssl.benchmark.output_folder import read_done
from lssl.benchmark.plan import SCRATCH, Cell, Plan
from lssl.benchmark.statistics import Difference, holm, paired
from lssl.benchmark.tasks import ONE_TASK, BenchmarkTask
from lssl.runs.outputs import read_cost, read_report, read_scores
from lssl.utils.errors import InputError

__all__ = ["Result", "by_subject", "choose", "collect", "differences", "entries"]

COLUMNS = ["stage", "task", "strategy", "seed", "labelled", "budget", "learning_rate"]
VALUES = ["subject", "session", "structure", "metric", "value", "cluster"]
ROW = ["strategy", "labelled", "budget", "task"]


@dataclass(frozen=True)
class Result:
    """A row of the comparison: a strategy at a number of labelled subjects and a budget, at its chosen learning rate.

    Attributes:
        strategy: its name.
        labelled: number of labelled subjects, as text; ``all``.
        budget: its name.
        rate: learning rate that the validation subjects chose.
        scores: seeds × test subjects, of the task's score.
        means: metric → mean over seeds, subjects and structures.
        structures: structure → mean score.
        hours: of fine-tuning one seed; pretraining apart.
        pretraining_hours: of pretraining one seed.
        compute: floating-point operations of fine-tuning one seed: steps × operations of a step.
        pretraining_compute: of pretraining one seed.
        clusters: subject → cluster of related subjects.
        task: what is compared.
        rising: why the row is not flat (see :mod:`lssl.benchmark.flatness`), or nothing.
        flat: what a longer budget adds, where that tells no improvement.
        p: p value of no difference to scratch, Holm-corrected over all rows of the comparison; NaN if unknown.
        difference: of the score to scratch at the same budget and labels; ``None`` for scratch itself.
        equal: the budget of the scratch row of equal total compute, and the difference to it.
    """

    strategy: str
    labelled: str
    budget: str
    rate: float
    scores: pd.DataFrame
    means: dict[str, float]
    structures: dict[str, float]
    hours: float
    pretraining_hours: float
    compute: float
    pretraining_compute: float
    clusters: dict[str, str]
    task: BenchmarkTask = ONE_TASK[""]
    rising: str = ""
    flat: str = ""
    p: float = float("nan")
    difference: Difference | None = None
    equal: tuple[str, Difference] | None = None

    @property
    def validation(self) -> float:
        """Mean validation figure; higher is better."""
        return self.task.validation_sign * self.means[self.task.validation_metric]

    @property
    def mean(self) -> float:
        """Mean score over seeds and subjects."""
        return float(self.scores.mean(axis=1).mean())


def collect(plan: Plan, fingerprints: dict[str, str]) -> pd.DataFrame:
    """All values of all finished cells, tidy."""
    notes = [(cell, note) for cell in plan.cells if (note := read_done(cell, fingerprints[cell.name]))]
    parts = [_cell_table(cell, note, plan.tasks.get(cell.task)) for cell, note in notes]
    if not any(cell.stage == "finetune" and read_done(cell, fingerprints[cell.name]) for cell in plan.cells):
        raise InputError(f"No fine-tuning in {plan.out} is finished, so there is nothing to compare.")
    table = pd.concat(parts, ignore_index=True)
    chosen = choose(table, plan.tasks)
    rows = zip(*(table[name] for name in (*ROW, "learning_rate")), strict=True)
    table.insert(len(COLUMNS), "chosen", [chosen.get(tuple(row)) == rate for *row, rate in rows])
    return table


def choose(
    table: pd.DataFrame, tasks: Mapping[str, BenchmarkTask] = ONE_TASK
) -> dict[tuple[str, str, str, str], float]:
    """``(strategy, labelled, budget, task)`` → the rate of the best mean validation figure; no test value is looked at.

    All seeds of a row share one rate. A rate with missing seeds loses to one with all seeds.

    Args:
        table: of :func:`collect`.
        tasks: name → task, which says what the figure is: without tasks, ``val_dice``.
    """
    tuned, chosen = table[table["stage"] == "finetune"], {}
    for name, task in tasks.items():
        figures = tuned[(tuned["metric"] == task.validation_metric) & (tuned["task"] == name)]
        for (strategy, labelled, budget, _), part in figures.groupby(ROW):
            by_rate = part.groupby("learning_rate")["value"].agg(["count", "mean"]).sort_index()
            complete = by_rate[by_rate["count"] == by_rate["count"].max()]
            best = float((task.validation_sign * complete["mean"]).idxmax())
            chosen[str(strategy), str(labelled), str(budget), name] = best
    return chosen


def by_subject(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Seeds × subjects: the mean over structures of the mean over visits or pairs of them."""
    part = scores[(scores["metric"] == metric) & scores["subject"].notna()]
    structures = part.groupby(["seed", "subject", "structure"])["value"].mean()
    return structures.groupby(["seed", "subject"]).mean().unstack("subject")


def entries(table: pd.DataFrame, order: list[str], tasks: Mapping[str, BenchmarkTask] = ONE_TASK) -> list[Result]:
    """Rows of the comparison, by task, labelled subjects and budget, strategies in a given order.

    Args:
        table: of :func:`collect`.
        order: of the strategies.
        tasks: name → task, in order.
    """
    tuned, pretrained = (table[table["stage"] == stage] for stage in ("finetune", "pretrain"))
    before = {str(name): _named(part) for name, part in pretrained.groupby("strategy")}
    found = [
        _result((str(a), str(b), str(c)), tasks[str(d)], part, before.get(str(a), {}))
        for (a, b, c, d), part in tuned[tuned["chosen"]].groupby(ROW)
    ]
    scratch = [entry for entry in found if entry.strategy == SCRATCH]
    budgets = [*tuned["budget"].unique()]  # as in the plan
    places = [*tasks]
    found.sort(
        key=lambda e: (
            places.index(e.task.name),
            _number(e.labelled),
            budgets.index(e.budget),
            order.index(e.strategy),
        )
    )
    found = [entry if entry.strategy == SCRATCH else _compared(entry, scratch) for entry in found]
    found = [_with_signs(entry, found) for entry in found]
    adjusted = holm([np.nan if entry.difference is None else entry.difference.p for entry in found])
    return [dataclasses.replace(entry, p=p) for entry, p in zip(found, adjusted, strict=True)]


def differences(found: list[Result]) -> pd.DataFrame:
    """The paired mean differences to scratch, as rows of ``results.csv``."""
    rows = [
        {
            "stage": "finetune",
            "task": entry.task.name,
            "strategy": entry.strategy,
            "labelled": entry.labelled,
            "budget": entry.budget,
            "learning_rate": entry.rate,
            "chosen": True,
            "metric": f"{entry.task.score}_minus_scratch",
            "value": entry.difference.mean,
            "low": entry.difference.low,
            "high": entry.difference.high,
            "p": entry.difference.p,
            "p_holm": entry.p,
            "ci_method": entry.difference.method,
            "seeds": entry.difference.seeds,
            "clusters": entry.difference.clusters,
        }
        for entry in found
        if entry.difference is not None
    ]
    columns = ["low", "high", "p", "p_holm", "ci_method", "seeds", "clusters"]
    return pd.DataFrame(rows, columns=[*COLUMNS, "chosen", *VALUES, *columns])


def _named(part: pd.DataFrame) -> dict[str, float]:
    """Metric → mean over seeds, of the figures of whole cells."""
    figures = part[part["subject"].isna()].groupby("metric")["value"].mean()
    return {str(metric): float(value) for metric, value in figures.items()}


def _compute(figures: dict[str, float]) -> float:
    return figures.get("steps", 0.0) * figures.get("flops_per_step", 0.0)


def _result(row: tuple[str, str, str], task: BenchmarkTask, part: pd.DataFrame, before: dict[str, float]) -> Result:
    """A row from its cells; ``before`` holds the figures of its pretraining."""
    scores = part[part["subject"].notna()]
    own = scores[scores["metric"] == task.score]
    if own["value"].isna().all():
        known = ", ".join(sorted(map(str, scores["metric"].unique()))) or "nothing"
        raise InputError(
            f"The tests of {task.name or 'fine-tuning'} ({', '.join(row)}) hold no {task.score} of a subject to "
            f"compare; they hold {known}."
        )
    means = {str(metric): float(np.nanmean(by_subject(scores, metric))) for metric in scores["metric"].unique()}
    means |= _named(part)
    related = scores[scores["cluster"].fillna("") != ""].drop_duplicates("subject")
    subjects = own.groupby(["structure", "seed", "subject"], sort=False)["value"].mean()
    structures = {str(name): float(value) for name, value in subjects.groupby("structure", sort=False).mean().items()}
    return Result(
        *row,
        float(part["learning_rate"].iloc[0]),
        by_subject(scores, task.score),
        means,
        structures,
        means["hours"],
        before.get("hours", 0.0),
        _compute(means),
        _compute(before),
        dict(zip(related["subject"], related["cluster"], strict=True)),
        task,
    )


def _compared(entry: Result, scratch: list[Result]) -> Result:
    """Adds differences to scratch: at the same budget, and at no more compute than both stages took.

    Among the scratch rows within that compute, the one with the best validation figure is taken. If none of them is
    longer than the row's own fine-tuning, there is no scratch of equal compute.
    """
    alike = [other for other in scratch if (other.task, other.labelled) == (entry.task, entry.labelled)]
    same = next((other for other in alike if other.budget == entry.budget), None)
    total = entry.compute + entry.pretraining_compute
    within = [other for other in alike if other.compute <= total or other is same]
    longer = same is not None and any(other.compute > same.compute for other in within)
    best = max(within, key=lambda other: other.validation) if longer else None
    difference = paired(entry.scores, same.scores, entry.clusters) if same else None
    equal = paired(entry.scores, best.scores, entry.clusters) if best else None
    return dataclasses.replace(entry, difference=difference, equal=(best.budget, equal) if best and equal else None)


def _with_signs(entry: Result, found: list[Result]) -> Result:
    """The entry, with the signs that it is not flat, or that it is; see :mod:`lssl.benchmark.flatness`."""
    flat = ""
    for other in found:
        same = (other.task, other.strategy, other.labelled) == (entry.task, entry.strategy, entry.labelled)
        if same and other.means.get("steps", 0) > entry.means.get("steps", 0):
            better, worse = (other, entry) if entry.task.higher else (entry, other)
            gain = paired(better.scores, worse.scores, entry.clusters)
            if gain is not None and gain.low > 0:
                return dataclasses.replace(entry, rising=f"{other.budget} is better by {gain}")
            if gain is not None:
                flat = f"{other.budget} is better by {gain}"
    loss = entry.means.get("loss_fall", 0.0)
    falls = f"its training loss fell by {loss:.0%} over the last third" if loss > FALL else ""
    return dataclasses.replace(entry, rising=falls, flat="" if falls else flat)


def _cell_table(cell: Cell, note: dict, task: BenchmarkTask | None) -> pd.DataFrame:
    figures = pd.DataFrame(_figures(cell, note, task), columns=["metric", "value"])
    parts = [figures]
    if cell.stage == "finetune":
        scores = read_scores(cell.run)
        parts.append(scores.assign(subject=scores["subject"].where(scores["subject"] != "")))
    table = pd.concat(parts, ignore_index=True)
    labelled = "" if cell.stage == "pretrain" else "all" if cell.labelled is None else str(cell.labelled)
    rate = np.nan if cell.rate is None else cell.rate
    own: dict[str, Any] = dict(
        zip(COLUMNS, (cell.stage, cell.task, cell.strategy, cell.seed, labelled, cell.budget, rate), strict=True)
    )
    return table.assign(**own).reindex(columns=[*COLUMNS, *VALUES])


def _figures(cell: Cell, note: dict, task: BenchmarkTask | None) -> Iterator[tuple[str, float]]:
    """Of the whole cell."""
    yield "hours", note["seconds"][0] / 3600
    if cost := read_cost(cell.run):
        yield from ((name, value) for name, value in dataclasses.asdict(cost).items() if name != "pairs_per_step")
        yield "pairs_per_second", cost.pairs_per_second
    if cell.stage == "finetune" and task:
        yield task.validation_metric, _validation(cell, task.validation)
        if (loss := loss_fall(cell.run / "metrics.csv")) is not None:
            yield "loss_fall", loss
    if report := read_report(cell.run):
        yield from report.trained.items()
        yield from ((f"untrained/{name}", value) for name, value in report.untrained.items())


def _validation(cell: Cell, figure: str) -> float:
    """A figure of validation at the end of fine-tuning, of the weights that were tested."""
    log = pd.read_csv(cell.run / "metrics.csv")
    values = log[figure].dropna().tolist() if figure in log else []
    if not values:
        raise InputError(f"{cell.run / 'metrics.csv'} holds no {figure} to choose the learning rate by.")
    return float(values[-1])


def _number(labelled: str) -> float:
    return np.inf if labelled == "all" else float(labelled)
