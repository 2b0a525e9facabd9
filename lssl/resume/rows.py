"""The rows of metrics.csv, kept in the checkpoint: a resumed run replaces what was logged after it."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lssl.resume.place import Place
from lssl.utils.files import atomic_write

__all__ = ["forget_later_events", "forget_step", "logged_text", "open_row", "restore_text"]


def _loggers(trainer: L.Trainer) -> list[CSVLogger]:
    loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    return loggers if trainer.is_global_zero else []


def logged_text(trainer: L.Trainer) -> list[str]:
    """What each CSV logger has written so far; nothing on other ranks than the first."""
    texts = []
    for logger in _loggers(trainer):
        path = Path(logger.experiment.metrics_file_path)
        if path.parent.is_dir():  # somebody may have deleted it: the checkpoint is then all that is left
            logger.save()
        texts.append(path.read_text() if path.is_file() else "")
    return texts


def open_row(trainer: L.Trainer, place: Place) -> dict[str, float]:
    """The row that Lightning logs between the present hook and the next batch, with its ``step``; often empty.

    Lightning logs a step after ``on_train_batch_end``, and means of an epoch after ``on_train_epoch_end``.
    """
    own: Any = trainer
    loop, every = own.fit_loop, own.log_every_n_steps
    step = loop.epoch_loop._batches_that_stepped
    counts = loop.epoch_loop.batch_progress.current
    if place.in_epoch:
        logs = counts.processed > counts.completed and not loop._should_accumulate() and (step + 1) % (every or 1) == 0
    else:
        logs, step = place.batches == 0 and loop.epoch_progress.current.processed > trainer.current_epoch, step - 1
    values: dict[str, Any] = dict(own._logger_connector.metrics["log"]) if logs and every else {}
    if not values:
        return {}
    row = {name: float(value) for name, value in values.items()}
    return {"epoch": trainer.current_epoch, "step": step, **row}


def forget_step(trainer: L.Trainer) -> None:
    """Forgets the values of the latest logging step once it is over: a stop would log them again, at a later step."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    results = trainer.fit_loop.epoch_loop._results
    if every and trainer.global_step % every == 0:
        for value in results.values():
            if value.meta.on_step and not value.meta.on_epoch:
                value.reset()


def restore_text(trainer: L.Trainer, texts: list[str], row: Mapping[str, float]) -> None:
    """Makes each CSV logger continue from a text.

    Args:
        trainer: of the resumed run.
        texts: by :func:`logged_text`; a file without one continues as it is.
        row: a further one, by :func:`open_row`.
    """
    for number, logger in enumerate(_loggers(trainer)):
        path = Path(logger.log_dir) / "metrics.csv"
        text = texts[number] if number < len(texts) else path.read_text() if path.is_file() else ""
        with warnings.catch_warnings():  # Lightning's logger says here that it deletes the file
            warnings.simplefilter("ignore")
            writer = logger.experiment
        writer.metrics, writer.metrics_keys = [], next(csv.reader(io.StringIO(text)), [])
        if text:
            with atomic_write(path) as part:
                part.write_text(text)
        else:
            path.unlink(missing_ok=True)
        if row:
            logger.log_metrics({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))
            logger.save()


def forget_later_events(trainer: L.Trainer, step: int) -> None:
    """Tells TensorBoard to drop what the interrupted run logged after a step, as SummaryWriter's ``purge_step`` does.

    Args:
        trainer: of the resumed run.
        step: of the checkpoint. Monitors log at it, and the next training step too: that one may be shown twice.
    """
    writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    if not writers or not trainer.is_global_zero:
        return
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

    for writer in writers:
        file: Any = writer._get_file_writer()
        file.add_event(Event(step=step, file_version="brain.Event:2"))
        file.add_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
