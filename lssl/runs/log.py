"""Reads the logs of runs from their folders; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lssl.utils.errors import InputError

__all__ = ["RunLog", "better", "ordered_kinds", "ordered_taps", "read_run"]

#: Kinds of the monitor, as :mod:`lssl.evaluation.representation` names them → 1 if more is better, -1 if less is,
#: 0 if neither.
KINDS = {
    "feature_std": 1,
    "scale": 0,
    "rank": 1,
    "correlation": -1,
    "uniformity": -1,
    "alignment": -1,
    "matching": 1,
    "consistency": 1,
    "shuffled": 0,
    "position": 0,
    "shortcut": -1,
    "dice": 1,
    "retrieval": 1,
    "identity": 1,
    "interval": 1,
    "order": 1,
    "age": 1,
}

#: Figures that strategies and the Segmenter log besides the terms of their loss, by one part of their name.
LOGGED = {"feature_std": 0, "skipped": 0, "prototypes": 0, "match": 0, "agreement": 1, "explained": 1, "dice": 1}


@dataclass
class RunLog:
    """One run.

    Attributes:
        folder: of the run.
        curves: name → steps and values, finite ones only, in the order of steps.
        config: resolved; empty if the folder holds none.
    """

    folder: Path
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.resolve().name

    def best(self, name: str) -> float | None:
        """The best value of a curve; ``None`` if neither high nor low is better."""
        sense = better(name)
        return None if not sense else float(sense * (sense * self.curves[name][1]).max())


def better(name: str) -> int:
    """1 if more is better, -1 if less is better, 0 if neither or unknown."""
    group, _, rest = name.partition("/")
    if group == "monitor":
        return KINDS.get(rest.split("/")[0], 0)
    if group == "learning_rate":
        return 0
    return next((LOGGED[part] for part in rest.split("/") if part in LOGGED), -1)  # a lower loss is better


def ordered_kinds(runs: Sequence[RunLog]) -> list[str]:
    """Kinds that were measured, in the order of :data:`KINDS`."""
    measured = {name.split("/")[1] for run in runs for name in run.curves if name.startswith("monitor/")}
    return [kind for kind in KINDS if kind in measured]


def ordered_taps(runs: Sequence[RunLog]) -> list[str]:
    """Taps that were measured, in the order of the forward pass; unknown names come last."""
    names = (name.split("/", 2) for run in runs for name in run.curves if name.startswith("monitor/"))
    measured = {parts[2] for parts in names if len(parts) == 3}
    rooms = {"encoder": 0, "skip": 1, "bottleneck": 2, "decoder": 3}

    def place(tap: str) -> tuple[int, int, str]:
        room, _, level = tap.partition(".")
        depth = int(level) if level.isdigit() else 0
        return rooms.get(room, 4), -depth if room == "decoder" else depth, tap

    return sorted(measured, key=place)


def read_run(folder: Path) -> RunLog:
    """Reads ``metrics.csv`` of a run folder; a resumed run continues that of the run before it."""
    if not folder.is_dir():
        near = (
            sorted(str(path.parent) for path in folder.parent.glob("*/metrics.csv")) if folder.parent.is_dir() else []
        )
        there = f" {folder.parent} holds the runs {', '.join(near)}." if near else ""
        raise InputError(f"There is no run folder {folder}.{there}")
    path = folder / "metrics.csv"
    if not path.is_file():
        inside = sorted(str(path.parent) for path in folder.glob("*/metrics.csv"))
        hint = (
            f"did you mean {inside[0]}?" if inside else "runs logged to TensorBoard or W&B alone are looked at there."
        )
        raise InputError(f"{folder} holds no metrics.csv, so it is no run of lssl fit that logs to CSV: {hint}")
    return RunLog(folder, _curves(path), _config(folder / "config.yaml"))


def _curves(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """If a step was logged twice, the last value counts."""
    try:
        table = pd.read_csv(path, index_col=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError):
        raise InputError(f"{path} is damaged or empty.") from None
    if "step" not in table:
        raise InputError(f"{path} has no column step, so it is no log of lssl fit.")
    step = pd.to_numeric(table["step"], errors="coerce")
    table = table[np.isfinite(step)].assign(step=step)
    curves = {}
    for name in table.columns.drop(["step", "epoch"], errors="ignore"):
        values = pd.to_numeric(table[name], errors="coerce")
        kept = values[np.isfinite(values)].groupby(table["step"]).last()
        if len(kept):
            curves[str(name)] = kept.index.to_numpy(int), kept.to_numpy(float)
    return curves


def _config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
