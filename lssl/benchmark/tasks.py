"""Tasks that a benchmark fine-tunes for: what each is compared by, and which way is better; without torch.

================= =========================== ================================= ===========================
model             score of a test subject     chosen by, on validation subjects labelled subjects
================= =========================== ================================= ===========================
Segmenter         ``dice``, higher            ``val/dice``                      each number of ``labelled``
ChangeSegmenter   ``f1`` by lesion, higher    ``val/dice``                      each number of ``labelled``
Classifier        ``brier``, lower            ``val/brier``                     all
Regressor         ``absolute_error``, lower   ``val/mae``                       all
any other         ``score`` and ``better``    ``val/loss``, lower               each number of ``labelled``
================= =========================== ================================= ===========================

A Classifier or Regressor has one target of a subject and no label maps, so it learns from all training subjects.
``score`` and ``better`` of a task's settings replace those of the table; the test must write that score
(:func:`lssl.runs.outputs.read_scores`). ``labelled`` of a task replaces the numbers of the plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lssl.utils.errors import InputError

__all__ = ["ONE_TASK", "BenchmarkTask", "find_task", "only_task"]

TITLES = {"dice": "Dice", "f1": "F1 by lesion", "brier": "Brier score"}


@dataclass(frozen=True)
class BenchmarkTask:
    """What rows are compared by.

    Attributes:
        name: in the plan; empty if the plan names no tasks.
        score: metric of test subjects.
        higher: whether a higher score is better.
        validation: figure of the log that learning rates are chosen by.
        validation_higher: whether a higher one is better.
        few_labels: whether it learns from label maps, and so from few of them.
        beside: head of a column that is shown beside the score → its metric; ``(true)`` adds that of the truth.
    """

    name: str = ""
    score: str = "dice"
    higher: bool = True
    validation: str = "val/dice"
    validation_higher: bool = True
    few_labels: bool = True
    beside: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The score in words."""
        return TITLES.get(self.score, self.score.replace("_", " "))

    @property
    def arrow(self) -> str:
        """Which way is better."""
        return "↑" if self.higher else "↓"

    @property
    def sign(self) -> int:
        """What makes a higher score or difference better."""
        return 1 if self.higher else -1

    @property
    def validation_metric(self) -> str:
        """The validation figure as ``results.csv`` names it."""
        return self.validation.replace("/", "_")

    @property
    def validation_sign(self) -> int:
        """What makes a higher validation figure better."""
        return 1 if self.validation_higher else -1


KINDS = {
    "Segmenter": BenchmarkTask(
        beside={"STCS (true)": "stcs", "ASPC, % (true)": "aspc", "↓ trajectory error, %/y": "trajectory_error"}
    ),
    "ChangeSegmenter": BenchmarkTask(
        score="f1",
        beside={
            "↑ sensitivity": "sensitivity",
            "↑ precision": "precision",
            "↓ false lesions of an unchanged pair": "false_lesions",
        },
    ),
    "Classifier": BenchmarkTask(
        score="brier",
        higher=False,
        validation="val/brier",
        validation_higher=False,
        few_labels=False,
        beside={
            "↑ AUC": "auc",
            "↑ balanced accuracy": "balanced_accuracy",
            "↓ Brier score of the training shares": "brier_constant",
        },
    ),
    "Regressor": BenchmarkTask(
        score="absolute_error",
        higher=False,
        validation="val/mae",
        validation_higher=False,
        few_labels=False,
        beside={"↑ R²": "r2", "↓ absolute error of the training median": "mae_constant"},
    ),
}
ONE_TASK = {"": KINDS["Segmenter"]}  # of a plan that names none


def only_task(config: Mapping[str, Any]) -> BenchmarkTask:
    """The task of a plan that names none; refuses a model that is known not to be a Segmenter.

    Args:
        config: of its fine-tuning.
    """
    name = _class_name(config)
    if name in KINDS and name != "Segmenter":
        raise InputError(
            f"finetune: its model is {name}, and without tasks a Segmenter is fine-tuned; name it, as in finetune: "
            f"{{tasks: {{my_task: {{model: {{class_path: lssl.{name}}}}}}}}}."
        )
    return KINDS["Segmenter"]


def find_task(name: str, own: Mapping[str, Any], config: Mapping[str, Any]) -> BenchmarkTask:
    """A task that a plan names.

    Args:
        name: in the plan.
        own: its settings.
        config: of its fine-tuning.
    """
    model = _class_name(config)
    kind = KINDS.get(model)
    if kind is None and not own.get("score"):
        raise InputError(
            f"finetune.tasks.{name}: its model is {model or 'not given'}, which is none of {', '.join(KINDS)}; give "
            f"score and better: which score of its test subjects is compared, and whether higher or lower is better."
        )
    if kind is not None and not kind.few_labels and "labelled" in own:
        raise InputError(
            f"finetune.tasks.{name}: a {model} learns from a target of each training subject, not from label maps; "
            f"leave out labelled."
        )
    found = kind or BenchmarkTask(validation="val/loss", validation_higher=False)
    if own.get("score"):
        found = dataclasses.replace(found, score=own["score"], higher=own["better"] == "higher")
    return dataclasses.replace(found, name=name)


def _class_name(config: Mapping[str, Any]) -> str:
    """Last part of the model's class path."""
    model = config.get("model")
    path = model.get("class_path") if isinstance(model, Mapping) else model
    return str(path or "").rpartition(".")[2]
