"""What ``lssl fit``, ``validate``, ``test`` and ``predict`` say at their end: their folder, and what to type next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lssl.data.source import DataSource
from lssl.runs.result_folder import ResultFolder
from lssl.utils.closing import say_next

__all__ = ["say_ending"]


def say_ending(command: str, args: Sequence[str], trainer: Any, model: Any, data: Any) -> None:
    """Prints the last lines of a command.

    Args:
        command: its name.
        args: as typed; evaluation takes them over for what comes next.
        trainer: after the command.
        model: its task.
        data: its datamodule.
    """
    run = Path(trainer.default_root_dir)
    if command == "fit":
        say_next(run, *_after_fit(run, model, data))
        return
    if command != "predict":
        later = "test" if command == "validate" and _testable(model, data) else "predict"
        say_next(_results(trainer, run / command), [later, *(arg for arg in args if not arg.startswith("--verbose"))])
        return
    path = trainer.ckpt_path
    export = [["export", str(path), str(_unused(run / "export"))]] if path else []
    say_next(_results(trainer, run / command), *export)


def _results(trainer: Any, otherwise: Path) -> Path:
    """Where callbacks of the command have written."""
    folders = [call.folder for call in trainer.callbacks if isinstance(call, ResultFolder)]
    return next((folder for folder in folders if folder != Path()), otherwise)


def _after_fit(run: Path, model: Any, data: Any) -> list[list[str]]:
    saved = [name for name in ("best", "last") if (run / "checkpoints" / f"{name}.ckpt").is_file()]
    config = ["--config", str(run / "config.yaml")]
    if not model.PRETRAINS:
        later = "test" if _testable(model, data) else "predict"
        return [[later, *config, "--ckpt_path", saved[0]]] if saved else []
    commands = [["show", str(run)]] if (run / "metrics.csv").is_file() else []
    if saved and isinstance(data, DataSource) and Path(data.location).exists() and len(data.labelled_rows("train")):
        start = ["--model.init_args.pretrained", str(run / "checkpoints" / f"{saved[-1]}.ckpt")]
        commands.append(["fit", "--config", "finetune", "--data", data.location, *_as_read(model, data), *start])
    return commands


def _as_read(model: Any, data: DataSource) -> list[str]:
    """Options by which fine-tuning reads the labels and channels that this run has read."""
    labels, suffixes = getattr(data, "labels", None), getattr(data, "suffixes", [])
    options = ["--data.init_args.labels", labels] if isinstance(labels, str) else []
    if len(suffixes) > 1:
        options += ["--data.init_args.suffix", f"[{','.join(suffixes)}]"]
    if getattr(data, "partial", False):
        options += ["--data.init_args.missing_channels", "keep", "--views.contrasts", model.views.contrasts]
    return options


def _testable(model: Any, data: Any) -> bool:
    """Whether there is something to test on."""
    return isinstance(data, DataSource) and model.can_test(data)


def _unused(folder: Path) -> Path:
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free
