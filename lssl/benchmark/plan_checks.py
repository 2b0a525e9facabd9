"""Checks of a benchmark's YAML before it is turned into cells; without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lssl.utils.errors import InputError, nearest

__all__ = ["GROUPS", "ONLY", "SCRATCH", "check_plan"]

SCRATCH = "scratch"
ONLY = "only"  # of scratch: no other row has that budget
GROUPS = ("data", "backbone", "views", "model", "monitor", "trainer")
KEYS = (
    "out",
    "seeds",
    "labelled",
    "rotate",
    "pretrain",
    "finetune",
    "strategies",
    "slurm",
    "data",
    "backbone",
    "views",
)
STAGE_KEYS = {
    "pretrain": ("config", *GROUPS),
    "finetune": ("config", "learning_rates", "budgets", "tasks", *GROUPS),
    "tasks": ("config", "labelled", "score", "better", *GROUPS),
    "strategies": ("config", "part", "partial", "pretrained", *GROUPS),
}


def check_plan(text: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Refuses plans that cannot be turned into cells.

    Args:
        text: the plan.
        path: of its YAML, for messages.

    Returns:
        Its strategies, scratch among them.
    """
    _check_keys(text, KEYS, "")
    for stage in ("pretrain", "finetune", "strategies"):
        if not isinstance(text.get(stage) or {}, Mapping):
            raise InputError(f"{path}: '{stage}' holds settings by name, not {text[stage]!r}.")
    strategies = {SCRATCH: None, **(text.get("strategies") or {})}
    _check_lists(text)
    _check_stages(text, strategies)
    _check_rotation(text)
    return strategies


def _check_keys(part: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in part:
        if key not in known:
            raise InputError(f"The benchmark has no key '{where}{key}'{nearest(str(key), known)}")


def _check_lists(text: Mapping[str, Any]) -> None:
    for key in ("out", "seeds", "labelled", "finetune"):
        if not text.get(key) and not (key == "labelled" and (text.get("finetune") or {}).get("tasks")):
            raise InputError(f"The benchmark says no '{key}'; configs/benchmark/demo.yaml shows one.")
    _check_numbers("seeds", text["seeds"], 0)
    _check_numbers("labelled", text.get("labelled") or [None], 1)


def _check_numbers(key: str, values: Any, least: int) -> None:
    """Refuses what is no list of different numbers; that of labelled subjects may hold null, for all."""
    numbers = [v for v in values if not (v is None and least)] if isinstance(values, list) else [""]
    if any(type(v) is not int or v < least for v in numbers) or not values or len({*values}) < len(values):
        raise InputError(f"{key} is {values}; give a list of different whole numbers from {least} on.")


def _check_stages(text: Mapping[str, Any], strategies: Mapping[str, Any]) -> None:
    finetune = text["finetune"]
    _check_keys(text.get("pretrain") or {}, STAGE_KEYS["pretrain"], "pretrain.")
    _check_keys(finetune, STAGE_KEYS["finetune"], "finetune.")
    for name, own in strategies.items():
        if not re.fullmatch(r"[\w-]+", str(name)):
            raise InputError(f"strategies: '{name}' names a folder; use letters, digits, - and _.")
        if name == SCRATCH and own is not None:
            raise InputError("strategies: scratch has no pretraining; give null, or another name.")
        if name != SCRATCH and not isinstance(own, Mapping):
            raise InputError(f"strategies: '{name}' needs settings, at least a config or a model.")
        _check_keys(own or {}, STAGE_KEYS["strategies"], f"strategies.{name}.")
        _check_file(name, own or {})
        if own is not None and own.get("part", "network") not in ("network", "encoder"):
            raise InputError(f"strategies.{name}.part is '{own['part']}'; give network or encoder.")
    _check_finetune(finetune)
    trained = [name for name, own in strategies.items() if own is not None and not own.get("pretrained")]
    if trained and "max_steps" not in ((text.get("pretrain") or {}).get("trainer") or {}):
        raise InputError("pretrain.trainer.max_steps is missing: the strategies need a common number of steps.")


def _check_rotation(text: Mapping[str, Any]) -> None:
    """With rotation, the subjects that validate in one seed are tested in others, so no rate can be chosen on them."""
    rotate = text.get("rotate")
    if rotate is None:
        return
    tasks = (text["finetune"].get("tasks") or {}).values()
    numbers = [value for part in (text, *tasks) for value in part.get("labelled") or []]
    most = max((value for value in numbers if value is not None), default=1)
    if type(rotate) is not int or rotate < most + 2:
        raise InputError(
            f"rotate is {rotate}; give a number of folds, at least {most + 2}: {most} to train, one to validate and "
            f"one to test."
        )
    if len(text["finetune"]["learning_rates"]) > 1:
        raise InputError(
            "rotate: subjects that validate in one seed are tested in others, so learning_rates can be only one; "
            "choose it on other subjects."
        )


def _check_file(name: str, own: Mapping[str, Any]) -> None:
    """A row that starts from a file is not pretrained here."""
    if own.get("pretrained") and (both := [key for key in ("config", *GROUPS) if key in own]):
        raise InputError(f"strategies.{name}: it starts from a file (pretrained), so it takes no {both[0]}.")
    if own.get("pretrained") and not Path(own["pretrained"]).is_file():
        raise InputError(f"strategies.{name}.pretrained: there is no file {own['pretrained']}.")


def _check_finetune(finetune: Mapping[str, Any]) -> None:
    rates, budgets = finetune.get("learning_rates"), finetune.get("budgets")
    try:
        good = bool(rates) and all(float(rate) > 0 for rate in rates or [])
    except (TypeError, ValueError):
        good = False
    if not good:
        raise InputError(f"finetune.learning_rates is {rates}; give a list of numbers above 0, the same for all rows.")
    if finetune.get("tasks") is not None:
        _check_tasks(finetune["tasks"])
    if not isinstance(budgets, Mapping) or not budgets:
        raise InputError("finetune.budgets is missing; give each a name and trainer: {max_steps: …}.")
    for name, budget in budgets.items():
        _check_keys(budget or {}, (ONLY, *GROUPS), f"finetune.budgets.{name}.")
        steps = ((budget or {}).get("trainer") or {}).get("max_steps")
        if type(steps) is not int or steps < 1 or not re.fullmatch(r"[\w-]+", str(name)):
            raise InputError(f"finetune.budgets.{name} needs a plain name and trainer: {{max_steps: …}}, above 0.")
        if budget.get(ONLY, SCRATCH) != SCRATCH:
            raise InputError(f"finetune.budgets.{name}.only is {budget[ONLY]!r}; give scratch, or leave it out.")
    if all(ONLY in budget for budget in budgets.values()):
        raise InputError("finetune.budgets are all of scratch alone (only); give one for all rows.")


def _check_tasks(tasks: Any) -> None:
    if not isinstance(tasks, Mapping) or not tasks:
        raise InputError(f"finetune.tasks is {tasks!r}; give each task a name and a config or a model.")
    for name, own in tasks.items():
        where = f"finetune.tasks.{name}"
        if not re.fullmatch(r"[\w-]+", str(name)):
            raise InputError(f"finetune.tasks: '{name}' names a folder; use letters, digits, - and _.")
        if not isinstance(own, Mapping):
            raise InputError(f"{where} is {own!r}; give a config or a model, or {{}} for finetune's own.")
        _check_keys(own, STAGE_KEYS["tasks"], f"{where}.")
        if "labelled" in own:
            _check_numbers(f"{where}.labelled", own["labelled"], 1)
        score, better = own.get("score"), own.get("better")
        if (score is None) != (better is None) or not isinstance(score, str | None):
            raise InputError(f"{where}: give score and better together, as in score: hd95, better: lower.")
        if better not in (None, "higher", "lower"):
            raise InputError(f"{where}.better is {better!r}; give higher or lower.")
