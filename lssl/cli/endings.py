"""What ``lssl fit``, ``validate``, ``test`` and ``predict`` say at their end: their folder, and what to type next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lssl.callbacks import EmbeddingWriter
from lssl.data.source import DataSource
from lssl.segmentation.report import SegmentationReport
from lssl.segmentation.segmenter import Segmenter
from lssl.segmentation.writer import SegmentationWriter
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
        later = "test" if command == "validate" and _labelled(model, data, "test") else "predict"
        report = next((call for call in trainer.callbacks if isinstance(call, SegmentationReport)), None)
        folder = report.folder if command == "test" and report else run / command
        say_next(folder, [later, *(arg for arg in args if not arg.startswith("--verbose"))])
        return
    writer = next(call for call in trainer.callbacks if isinstance(call, _writer_of(model)))
    path = trainer.ckpt_path
    say_next(writer.folder, *([["export", str(path), str(_unused(run / "export"))]] if path else []))


def _writer_of(model: Any) -> Any:
    return SegmentationWriter if isinstance(model, Segmenter) else EmbeddingWriter


def _after_fit(run: Path, model: Any, data: Any) -> list[list[str]]:
    saved = [name for name in ("best", "last") if (run / "checkpoints" / f"{name}.ckpt").is_file()]
    config = ["--config", str(run / "config.yaml")]
    if isinstance(model, Segmenter):
        later = "test" if _labelled(model, data, "test") else "predict"
        return [[later, *config, "--ckpt_path", saved[0]]] if saved else []
    commands = [["show", str(run)]] if (run / "metrics.csv").is_file() else []
    if saved and isinstance(data, DataSource) and Path(data.location).exists() and _labelled(model, data, "train"):
        start = ["--model.init_args.pretrained", str(run / "checkpoints" / f"{saved[-1]}.ckpt")]
        labels = getattr(data, "labels", None)
        pattern = ["--data.init_args.labels", labels] if isinstance(labels, str) else []
        commands.append(["fit", "--config", "finetune", "--data", data.location, *pattern, *start])
    return commands


def _labelled(model: Any, data: Any, split: str) -> bool:
    """Whether there is something to test or train on: labels for a Segmenter, or subjects for a strategy."""
    if not isinstance(data, DataSource):
        return False
    if split == "test" and not isinstance(model, Segmenter):
        return bool((data.table["split"] == "test").any())
    return len(data.labelled_rows(split)) > 0


def _unused(folder: Path) -> Path:
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free
