"""The tables, as Markdown and as HTML; without torch."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from lssl.benchmark.plan import SCRATCH, Plan
from lssl.benchmark.results import Result
from lssl.benchmark.statistics import METHOD
from lssl.benchmark.tasks import BenchmarkTask

__all__ = ["Table", "as_html", "as_markdown", "ceiling_warnings", "is_ceiling", "sheets"]

ALPHA = 0.05

#: Kinds of the pretraining's report that are shown: title and note.
FROZEN = {
    "dice": (
        "↑ Dice of a linear probe",
        "A classifier of single voxels, tested on other subjects; it need not agree with what fine-tuning gains.",
    ),
    "rank": ("↑ effective rank", "Of voxel features; a collapse has 1."),
    "retrieval": ("↑ cross-visit retrieval", "How often a subject's other visit is the nearest of all."),
}


@dataclass
class Table:
    """A table with its title and notes; ``**bold**`` marks bold cells."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def sheets(plan: Plan, table: pd.DataFrame, found: list[Result]) -> list[Table]:
    """All that have rows: those of each task, then those of pretraining."""
    tuned: list[Table] = []
    for task in plan.tasks.values():
        if own := [entry for entry in found if entry.task == task]:
            scores = _scores(plan, task, own)
            said = {note for sheet in tuned for note in sheet.notes}
            scores.notes = [note for place, note in enumerate(scores.notes) if not place or note not in said]
            tuned += [scores, *([_structures(task, own)] if task.few_labels else [])]
    pretraining = [_costs(plan, table), *_frozen(plan, table), _differences(plan)]
    return [sheet for sheet in (*tuned, *pretraining) if sheet.rows]


def _scores(plan: Plan, task: BenchmarkTask, found: list[Result]) -> Table:
    bold = _best(found)
    rows = []
    for entry in found:
        sd = entry.scores.mean(axis=1).std(ddof=1)  # of seeds' means
        score = f"{entry.mean:.3f}" + (f" ± {sd:.3f}" if len(entry.scores) > 1 else "")
        equal = "–" if entry.equal is None else f"{entry.equal[1]} ({entry.equal[0]})"
        mean = entry.means
        rows.append(
            [
                f"{entry.labelled}{' (ceiling)' if is_ceiling(entry) else ''}",
                f"{entry.budget}{' (not flat)' if entry.rising else ''}",
                entry.strategy,
                plan.parts[entry.strategy],
                f"**{score}**" if id(entry) in bold else score,
                "–" if entry.difference is None else str(entry.difference),
                equal,
                f"{entry.rate:g}",
                *(_beside(mean, name, head) for head, name in task.beside.items()),
                f"{entry.pretraining_compute / 1e12:.3g} + {entry.compute / 1e12:.3g}",
            ]
        )
    head = [
        "labelled",
        "budget",
        "strategy",
        "transferred",
        f"{task.arrow} {task.title}, mean ± sd over seeds",
        "− scratch [95 %]",
        "− scratch of equal total compute [95 %] (its budget)",
        "rate",
        *task.beside,
        "compute of a seed, TFLOP, pretraining + fine-tuning",
    ]
    title = f"Fine-tuned for {task.name}" if task.name else "Fine-tuned on few labels"
    return Table(title, head, rows, _score_notes(task, found, plan.rotate))


def _score_notes(task: BenchmarkTask, found: list[Result], rotate: int) -> list[str]:
    """Notes on intervals, bold cells and compute, and warnings about untrustworthy rows."""
    seeds, subjects = max(len(entry.scores) for entry in found), max(entry.scores.shape[1] for entry in found)
    clusters = max((entry.difference.clusters for entry in found if entry.difference), default=subjects)
    of_clusters = f" in {clusters} clusters (family, site or label map)" if clusters < subjects else ""
    notes = [
        f"{seeds} seeds, {subjects} test subjects{of_clusters}. Intervals of paired differences: {METHOD}; seeds and "
        "clusters are both random, and clusters weigh alike.",
        f"Bold: the best of its group, where its difference to scratch is {'above' if task.higher else 'below'} 0 (p < "
        "0.05, Holm-corrected over the rows of "
        f"{'all tasks, which are one family' if task.name else 'this table'}).",
        "Rates were chosen from one grid for all, by validation subjects alone. Equal total compute: scratch at the "
        "budget that validation prefers among those that take no more operations than both stages together; – where "
        "no longer scratch fits. Operations are those of convolutions, matrix products and attention, steps × the "
        "first step's, whatever the machine.",
    ]
    if not task.few_labels:
        notes.append(f"{task.name} is learned from all training subjects: it needs no label maps, which could be few.")
    if rotate:
        notes.append(
            f"Seeds rotate over {rotate} folds of the subjects: each trains on as many folds as there are labelled "
            "subjects, validates on one and is tested on the others, so rows of other numbers have other test subjects."
        )
    return notes + _doubts(found, seeds) + ceiling_warnings(found)


def _doubts(found: list[Result], seeds: int) -> list[str]:
    """Notes on what the table cannot say: few seeds, one budget, rows that still improve."""
    notes = []
    if seeds == 1:
        notes.append("One seed gives no interval: take 5 or more before you believe a row.")
    elif seeds < 5:
        notes.append(
            "With 2 to 4 seeds the intervals are wide. With 2 they cover .92 instead of .95 where seeds differ most, "
            "and up to a tenth of the tables has a bold row by chance; take 5 or more before you believe a row."
        )
    if len({entry.budget for entry in found}) == 1:
        notes.append(
            "One budget: whether longer fine-tuning would change the order was not measured. The loss cannot say, "
            "as a schedule that ends at 0 flattens it; add a longer budget for a verdict."
        )
    for entry in found:
        row = f"{f'{entry.task.name}, ' if entry.task.name else ''}{entry.strategy}, {entry.labelled} labelled, "
        if entry.rising or entry.flat:
            notes.append(
                f"{'Not flat' if entry.rising else 'Flat'}: {row}{entry.budget}: {entry.rising or entry.flat}."
            )
    return notes


def is_ceiling(entry: Result) -> bool:
    """Whether a row is scratch on all labels, where there could be fewer."""
    return entry.strategy == SCRATCH and entry.labelled == "all" and entry.task.few_labels


def ceiling_warnings(found: list[Result]) -> list[str]:
    """A sentence for each ceiling that is worse than a row, which means that fine-tuning was too short."""
    texts = []
    for ceiling in (entry for entry in found if is_ceiling(entry)):
        task = ceiling.task
        fewer = [entry for entry in found if entry.task == task and entry.labelled != "all"]
        rows = [entry for entry in fewer if task.sign * entry.mean > task.sign * ceiling.mean]
        if rows:
            best = max(rows, key=lambda entry: task.sign * entry.mean)
            lies, most = ("below", "highest") if task.higher else ("above", "lowest")
            texts.append(
                f"The ceiling{f' of {task.name}' if task.name else ''} (scratch on all labels, {ceiling.budget}: "
                f"{ceiling.mean:.3f}) lies {lies} {len(rows)} of the rows with fewer labels ({most}: {best.strategy}, "
                f"{best.labelled}, {best.budget}: {best.mean:.3f}). Fine-tuning is too short to fit all labels; give "
                f"it more steps before you compare."
            )
    return texts


def _structures(task: BenchmarkTask, found: list[Result]) -> Table:
    names = list(dict.fromkeys(name for entry in found for name in entry.structures))
    rows = [
        [entry.labelled, entry.budget, entry.strategy]
        + [f"{entry.structures[name]:.3f}" if name in entry.structures else "–" for name in names]
        for entry in found
    ]
    title = f"{task.name}: {task.title} per structure" if task.name else f"{task.title} per structure"
    return Table(title, ["labelled", "budget", "strategy", *names], rows)


def _costs(plan: Plan, table: pd.DataFrame) -> Table:
    """What pretraining took."""
    head = ["strategy", "parameters", "ms/step", "pairs/s", "memory, GB", "hours"]
    columns = (("parameters", 0), ("ms_per_step", 0), ("pairs_per_second", 1), ("memory", 2), ("hours", 3))
    figures = _of_pretraining(table)
    rows = [
        [name, *(_figure(figures.get(name, {}), metric, digits) for metric, digits in columns)]
        for name in plan.parts
        if name != SCRATCH
    ]
    notes = ["Parameters with the heads of pretraining. Memory is that of the process, at most, without workers."]
    return Table("Pretraining", head, rows if figures else [], notes)


def _frozen(plan: Plan, table: pd.DataFrame) -> list[Table]:
    """Quality of the features before fine-tuning: a table per figure, a column per tap."""
    figures = _of_pretraining(table)
    known = dict.fromkeys(str(metric) for metric in table["metric"].unique())
    sheets = []
    for kind, (title, note) in FROZEN.items():
        taps = [metric.partition("/")[2] for metric in known if metric.startswith(f"{kind}/")]
        rows = []
        for name in plan.parts:
            mean, prefix = figures.get(name, {}), ""
            if name == SCRATCH:  # the network as every strategy found it
                untrained = table[table["metric"].str.startswith("untrained/")].groupby("metric")["value"].mean()
                mean, prefix = _named(untrained), "untrained/"
            rows.append([name, *(_figure(mean, f"{prefix}{kind}/{tap}", 2) for tap in taps)])
        notes = [note, "Of validation subjects, mean over seeds; scratch: the untrained network."]
        sheets.append(Table(f"Frozen features: {title}", ["strategy", *taps], rows if taps else [], notes))
    return sheets


def _of_pretraining(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Strategy → metric → mean over seeds."""
    figures = table[table["stage"] == "pretrain"].groupby(["strategy", "metric"])["value"].mean()
    return {str(name): _named(figures.xs(name)) for name in figures.index.unique("strategy")}


def _named(values: pd.Series) -> dict[str, float]:
    return {str(name): float(value) for name, value in values.items()}


def _differences(plan: Plan) -> Table:
    names = [name for name in plan.parts if name != SCRATCH]
    rows = [[key, *(str(row.get(name, "default")) for name in names)] for key, row in plan.differences().items()]
    notes = ["All else outside the methods' own options is the same: network, data, split, steps."]
    return Table("What differs between the pretrainings", ["setting", *names], rows, notes)


def _best(found: list[Result]) -> set[int]:
    """Entries in bold."""
    bold = set()
    for group in {(entry.task.name, entry.labelled, entry.budget) for entry in found}:
        rows = (entry for entry in found if (entry.task.name, entry.labelled, entry.budget) == group)
        best = max(rows, key=lambda entry: entry.task.sign * entry.mean)
        gained = best.difference is not None and best.task.sign * best.difference.mean > 0
        if gained and best.p < ALPHA:
            bold.add(id(best))
    return bold


def _beside(mean: dict[str, float], metric: str, head: str) -> str:
    """A figure; if true change worsens it, with the figure of the truth."""
    truth = f" ({_figure(mean, f'true_{metric}', 2)})" if head.endswith("(true)") else ""
    return _figure(mean, metric, 2) + truth


def _figure(mean: dict, key: str, digits: int) -> str:
    value = mean.get(key, np.nan)
    return "–" if value != value else f"{value:,.{digits}f}"


def as_markdown(all_sheets: list[Table]) -> str:
    """Markdown of all tables."""
    blocks = []
    for sheet in all_sheets:
        lines = [f"### {sheet.title}", "", _line(sheet.head), _line(["---"] * len(sheet.head))]
        lines += [_line(row) for row in sheet.rows]
        blocks.append("\n".join([*lines, "", *(f"- {note}" for note in sheet.notes)]))
    return "\n\n".join(blocks) + "\n"


def as_html(sheet: Table) -> str:
    """HTML of one table."""

    def cells(row: list[str], tag: str) -> str:
        texts = (re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text)) for text in row)
        return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"

    rows = [cells(sheet.head, "th"), *(cells(row, "td") for row in sheet.rows)]
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in sheet.notes)
    return f"<h2>{html.escape(sheet.title)}</h2><table>{''.join(rows)}</table>{notes}"


def _line(texts: list[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"
