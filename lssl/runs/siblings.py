"""Which run ``--ckpt_path last`` and ``best`` mean, if one command has made several runs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_info

from lssl.runs.folder import CONFIG, requeued_checkpoint
from lssl.utils.errors import InputError

__all__ = ["choose_run"]


def choose_run(folder: Path, given: str, settings: Mapping[str, Any], named: bool = False) -> Path:
    """The newest run of ``folder``, ``folder-2``, ``-3`` … that has the settings of this command.

    A run is as new as its latest checkpoint. Where there is a choice, a line says what was chosen. A run that SLURM has
    requeued is its own choice.

    Args:
        folder: as configured.
        given: ``best`` or ``last``, for the messages.
        settings: groups of this command's config that must equal those of the run.
        named: whether ``folder`` stands in the config of that very run, which then is no choice.

    Raises:
        InputError: there are several runs, and none has these settings.
    """
    ages = {run: age for run in _siblings(folder) if (age := _saved(run))}
    runs = sorted(ages, key=lambda run: ages[run])
    listed = ", ".join(map(str, runs))
    if requeued := next((run for run in runs if requeued_checkpoint(run)), None):
        return requeued
    if named or not runs or runs == [folder]:
        if later := [str(run) for run in runs if ages[run] > ages.get(folder, math.inf)]:
            rank_zero_info(f"--ckpt_path {given}: of {folder}, whose config was given; newer is {', '.join(later)}.")
        return folder
    differing = {run: _difference(run, settings) for run in runs} if len(runs) > 1 else {}
    chosen = next((run for run in reversed(runs) if not differing.get(run)), None)
    if chosen is None:
        name = f"--config {runs[-1] / CONFIG} --ckpt_path {given}"
        raise InputError(
            f"--ckpt_path {given}: there are several runs ({listed}), and none has the settings of this command "
            f"({differing[runs[-1]]} differs in the newest); name one, as in {name}."
        )
    others = [f"{run} is newer, but its {differing[run]} differs" for run in runs[runs.index(chosen) + 1 :]]
    why = "; ".join(others) if others else f"the newest of {listed}" if len(runs) > 1 else f"{folder} has no checkpoint"
    rank_zero_info(f"--ckpt_path {given}: of {chosen} ({why}).")
    return chosen


def _siblings(folder: Path) -> list[Path]:
    """The folder, and those that later runs of the same command took."""
    numbered = {
        int(found[1]): path
        for path in (folder.parent.iterdir() if folder.parent.is_dir() else ())
        if (found := re.fullmatch(re.escape(folder.name) + r"-([1-9]\d*)", path.name)) and int(found[1]) > 1
    }
    return [folder, *(folder.with_name(numbered[number].name) for number in sorted(numbered))]


def _saved(run: Path) -> float:
    """When the latest checkpoint was written; 0 without one."""
    saved = (*run.glob("checkpoints/*.ckpt"), *run.glob("hpc_ckpt_*.ckpt"))
    return max((path.stat().st_mtime for path in saved), default=0.0)


def _difference(run: Path, settings: Mapping[str, Any]) -> str:
    """The first setting of a run that is another one; nothing if all agree."""
    try:
        theirs = yaml.safe_load((run / CONFIG).read_text())
    except (OSError, yaml.YAMLError):
        return CONFIG
    return next(_differences(settings, {key: theirs.get(key) for key in settings}), "")


def _differences(one: Any, other: Any, key: str = "") -> Any:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in {**one, **other}:
            yield from _differences(one.get(name), other.get(name), f"{key}.{name}" if key else str(name))
    elif one != other:
        yield key
