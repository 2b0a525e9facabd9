"""The plan: a benchmark's YAML becomes cells, each a config and the commands that a user could type; without torch.

A **pretraining** cell is a strategy and a seed. A **fine-tuning** cell is a strategy, a seed, a number of labelled
subjects, a budget and a learning rate; it starts from the pretraining of its strategy and seed, or from scratch. Its
config is, later ones first: what the cell itself is, the strategy's own groups, those of its stage (``pretrain`` or
``finetune``), ``views``, ``backbone`` and ``data`` of all, and the config files; merged by the rule of
:mod:`lssl.cli.compose`, which also reads the plan. ``backbone`` and ``data`` of all *replace* the networks and the data
of the files, so that network and split are the same for every row; what a recipe needs of any data stays.

``finetune.tasks`` names several tasks, each with groups and config files of its own, over those of ``finetune``. Then
every strategy, seed, budget and learning rate is fine-tuned for each task (:mod:`lssl.benchmark.tasks`). A task whose
model is of another class leaves the model's arguments of ``finetune`` behind.

A seed is everything that chance decides in a row: pretraining, initial weights, crops, and which subjects are labelled.
All strategies of a seed share it, so that they are compared in pairs.

All cells share one split, unless the plan says ``rotate: N``. For cohorts so small that each subject is needed for the
test, this deals the subjects to N folds. Seed s trains on as many folds as there are labelled subjects, from fold s + 2
on; fold s + 1 validates, and all others are tested (:class:`lssl.data.folds.Folds`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lssl.benchmark.plan_checks import GROUPS, ONLY, SCRATCH, check_plan
from lssl.benchmark.tasks import ONE_TASK, BenchmarkTask, find_task, only_task
from lssl.cli.compose import Config, load, merged, without_data
from lssl.utils.errors import InputError

__all__ = ["SCRATCH", "Cell", "Plan", "read_plan"]

WANDB = ("RunWandb", "WandbLogger")
REPORTS = ("lssl.callbacks.Report", "lssl.callbacks.report.Report", "Report")  # the names of one class


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        name: also its folder in ``OUT/cells``.
        stage: ``pretrain`` or ``finetune``.
        strategy: name of its row.
        seed: of everything that is random.
        folder: of its config, log and run.
        config: what ``lssl fit`` is given.
        labelled: number of labelled subjects, ``None`` for all; this and the next two are for fine-tuning only.
        budget: its name.
        rate: learning rate.
        needs: name of the pretraining cell that it starts from.
        task: its name; empty if the plan names none.
    """

    name: str
    stage: str
    strategy: str
    seed: int
    folder: Path
    config: dict[str, Any]
    labelled: int | None = None
    budget: str = ""
    rate: float | None = None
    needs: str | None = None
    task: str = ""

    @property
    def run(self) -> Path:
        """Its run folder."""
        return self.folder / "run"

    @property
    def steps(self) -> int:
        """Training steps."""
        return int(self.config["trainer"]["max_steps"])

    def commands(self) -> list[list[str]]:
        """The commands that a user would type after ``lssl``."""
        fit = ["fit", "--config", str(self.folder / "config.yaml")]
        test = ["test", "--config", str(self.run / "config.yaml"), "--ckpt_path", "last"]
        return [fit] if self.stage == "pretrain" else [fit, test]


@dataclass(frozen=True)
class Plan:
    """A benchmark.

    Attributes:
        path: of its YAML.
        out: folder of everything it writes.
        cells: pretraining first.
        parts: strategy → what fine-tuning takes from it: ``network``, ``encoder`` or, from scratch, nothing (``–``).
        shared: what all cells have in common: its ``data`` and ``backbone``.
        slurm: parameters of submitit's executor.
        note: the recognised kind of its data, if they were given by a path.
        rotate: folds that the seeds rotate over, 0 for one split of all cells.
        tasks: name → task; one without a name if the plan names none.
    """

    path: Path
    out: Path
    cells: list[Cell]
    parts: dict[str, str]
    shared: dict[str, Any]
    slurm: dict[str, Any]
    note: str = ""
    rotate: int = 0
    tasks: dict[str, BenchmarkTask] = field(default_factory=lambda: ONE_TASK)

    def differences(self) -> dict[str, dict[str, Any]]:
        """Setting → strategy → value, of the pretraining settings that are not the same for all.

        A method's own options are left out: they always differ, and the cells' configs have them.
        """
        flat: dict[str, dict[str, Any]] = {}
        for cell in self.cells:
            if cell.stage == "pretrain" and cell.strategy not in flat:
                pairs = dict(_flat(cell.config))
                flat[cell.strategy] = {key: value for key, value in pairs.items() if _comparable(key)}
        keys = {key: None for values in flat.values() for key in values}
        table = {key: {name: values.get(key, "default") for name, values in flat.items()} for key in keys}
        return {key: row for key, row in table.items() if len({str(value) for value in row.values()}) > 1}


def read_plan(path: Path, out: Path | None = None, data: str | None = None) -> Plan:
    """Reads a benchmark's YAML.

    Args:
        path: the file.
        out: replaces its ``out``.
        data: a path or the name of a class, as ``--data`` of ``lssl fit``.
    """
    whole = Config()
    for source, layer in load(str(path)):
        whole.add(layer, source)
    if data is not None:
        whole.set("data", data)
    text = whole.values
    strategies = check_plan(text, path)
    out = out or Path(text["out"])
    tasks = _tasks(text, path.parent)
    cells: list[Cell] = []
    for name, own in strategies.items():
        cells += _rows(text, tasks, name, own, out, path.parent)
    cells.sort(key=lambda cell: (cell.stage != "pretrain", cell.seed))
    parts = {name: "–" if own is None else own.get("part", "network") for name, own in strategies.items()}
    shared = {key: text.get(key) or {} for key in ("data", "backbone")}
    _check_data(cells)
    suffix = (shared["data"].get("init_args") or {}).get("suffix", "T1w")
    note = whole.found.sentence(suffix) if whole.found else ""
    named = {task.name: task for task, _ in tasks}
    return Plan(path, out, cells, parts, shared, text.get("slurm") or {}, note, text.get("rotate") or 0, named)


def _tasks(text: Mapping[str, Any], beside: Path) -> list[tuple[BenchmarkTask, dict[str, Any]]]:
    """Each task with the config of its fine-tuning, before what a cell adds."""
    finetune, shared = text["finetune"], _shared(text)
    layers = _layers(finetune, beside)
    if not finetune.get("tasks"):
        base = _base(layers, shared, finetune)
        return [(only_task(base), base)]
    found = []
    for name, own in finetune["tasks"].items():
        before = [*layers, {"model": finetune["model"]}] if finetune.get("model") else layers
        files = merged(*_layers(own, beside))  # one layer, so that a model of another class keeps all its arguments
        base = _base([*before, files], shared, {**finetune, "model": None}, own)
        found.append((find_task(str(name), own, base), base))
    return found


def _rows(
    text: Mapping[str, Any],
    tasks: Sequence[tuple[BenchmarkTask, dict[str, Any]]],
    name: str,
    own: Mapping[str, Any] | None,
    out: Path,
    beside: Path,
) -> Iterator[Cell]:
    """All cells of a strategy."""
    shared, pretrain = _shared(text), text.get("pretrain") or {}
    for seed in text["seeds"]:
        start, weights = None, None if own is None else own.get("pretrained")
        if own is not None and not weights:
            start = f"pretrain/{name}/seed-{seed}"
            weights = str(out / "cells" / start / "run" / "checkpoints" / "last.ckpt")
            config = _base([*_layers(own, beside), *_layers(pretrain, beside)], shared, pretrain, own)
            fixed = {"seed_everything": seed, "trainer": _trainer(out, start, config, _pretraining_callbacks(config))}
            yield Cell(start, "pretrain", name, seed, out / "cells" / start, merged(config, fixed), needs=None)
        given = {"pretrained": weights, **{key: own[key] for key in ("part", "partial") if own and key in own}}
        for task, base in tasks:
            for labelled, budget in _settings(text, task, own is None):
                own_settings = text["finetune"]["budgets"][budget]
                tuned = merged(base, {key: value for key, value in own_settings.items() if key != ONLY})
                if text.get("rotate"):
                    folds = {"number": text["rotate"], "fold": seed % text["rotate"], "train": labelled}
                    tuned = merged(tuned, {"data": {"init_args": {"folds": folds}}})
                for rate in text["finetune"]["learning_rates"]:
                    yield _tuning(tuned, out, task, name, seed, labelled, budget, float(rate), start, given)


def _tuning(
    base: dict[str, Any],
    out: Path,
    task: BenchmarkTask,
    strategy: str,
    seed: int,
    labelled: int | None,
    budget: str,
    rate: float,
    start: str | None,
    given: Mapping[str, Any],
) -> Cell:
    """One fine-tuning cell. It is validated once, at the end: of labels, an epoch is as long as the budget."""
    many, steps = "all" if labelled is None else labelled, base["trainer"]["max_steps"]
    name = "/".join(["finetune", *([task.name] if task.name else []), strategy, f"seed-{seed}"])
    name += f"/labelled-{many}/{budget}/rate-{rate:g}"
    few: dict[str, Any] = {"subjects": labelled, "seed": seed, "steps": steps}
    if labelled is None:
        few["visits"] = None
    once = (
        {"check_val_every_n_epoch": None, "val_check_interval": steps} if task.name else {"check_val_every_n_epoch": 1}
    )
    fixed = {
        "seed_everything": seed,
        "data": {"init_args": {"few_shot": few}},
        "model": {"init_args": {"part": "network", **given, "optimizer": {"init_args": {"lr": rate}}}},
        "trainer": {**once, **_trainer(out, name, base, [])},
    }
    folder, config = out / "cells" / name, merged(base, fixed)
    return Cell(name, "finetune", strategy, seed, folder, config, labelled, budget, rate, start, task.name)


def _settings(text: Mapping[str, Any], task: BenchmarkTask, scratch: bool) -> list[tuple[int | None, str]]:
    """Numbers of labelled subjects × budgets; and from scratch the ceiling: all labels, the longest budget.

    A budget may be of scratch alone (``only: scratch``): is scratch flat, and does time explain a gain?
    """
    budgets = text["finetune"]["budgets"]
    own = (text["finetune"].get("tasks") or {}).get(task.name) or {}
    numbers = (own.get("labelled") or text.get("labelled") or [None]) if task.few_labels else [None]
    every = [(labelled, name) for labelled in numbers for name in budgets if scratch or ONLY not in budgets[name]]
    longest = max(budgets, key=lambda name: budgets[name]["trainer"]["max_steps"])
    return [*every, *([(None, longest)] if scratch and None not in numbers else [])]


def _shared(text: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of all cells."""
    return {key: text[key] for key in ("data", "backbone", "views") if text.get(key)}


def _layers(part: Mapping[str, Any], beside: Path) -> list[Mapping[str, Any]]:
    """Contents of the config files of a part of the plan."""
    return [layer for file in _paths(part) for _, layer in load(file, beside)]


def _base(layers: Sequence[Mapping[str, Any]], shared: Mapping[str, Any], *parts: Mapping[str, Any]) -> dict[str, Any]:
    """Files, then the groups of all, and of parts of the plan such as the stage and the strategy."""
    config = merged(*layers)
    if "backbone" in shared:
        config.pop("backbone", None)
    if "data" in shared:
        config = without_data(config)
    return merged(config, shared, *({key: part[key] for key in GROUPS if part.get(key)} for part in parts))


def _trainer(out: Path, name: str, config: Mapping[str, Any], callbacks: list[dict[str, Any]]) -> dict[str, Any]:
    """Output folder and measurements of a cell; they override its config file."""
    folder = str(out / "cells" / name / "run")
    csv = {
        "class_path": "lssl.runs.loggers.RunCSVLogger",
        "init_args": {"save_dir": folder, "name": "", "version": ""},
    }
    loggers = config.get("trainer", {}).get("logger") or []
    others = [_grouped(logger, out, name) for logger in _listed(loggers)]
    return {
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "logger": [csv, *others],
        "callbacks": callbacks,
    }


def _grouped(logger: Any, out: Path, name: str) -> Any:
    """Weights & Biases shows the cells of a benchmark as one group."""
    if not isinstance(logger, Mapping) or _last(logger) not in WANDB:
        return logger
    return merged(logger, {"init_args": {"name": name, "group": out.name}})


def _last(node: Mapping[str, Any]) -> str:
    return str(node.get("class_path")).rpartition(".")[2]


def _pretraining_callbacks(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The report on held-out pairs; it keeps the options of a report in the config."""
    callbacks = config.get("trainer", {}).get("callbacks") or []
    named = [{"class_path": one} if isinstance(one, str) else dict(one) for one in _listed(callbacks)]
    return [one for one in named if one.get("class_path") in REPORTS] or [{"class_path": REPORTS[0]}]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _paths(part: Mapping[str, Any]) -> list[str]:
    files = part.get("config") or []
    return [files] if isinstance(files, str) else list(files)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _comparable(key: str) -> bool:
    own = key.startswith("model.") and not key.startswith(("model.init_args.optimizer", "model.init_args.schedule"))
    return not own and not key.startswith(("trainer.default_root_dir", "trainer.callbacks", "trainer.logger"))


def _check_data(cells: Sequence[Cell]) -> None:
    for cell in cells:
        if not (cell.config.get("data") or {}).get("class_path"):
            raise InputError(
                f"The benchmark says no 'data' for {cell.name}; give data: PATH (a prepared folder, a BIDS folder, a "
                f"table of visits), or data: {{class_path: …}}."
            )
