"""Progress: one bar to the last step with the time left; a line per validation where the output is no terminal."""

from __future__ import annotations

import logging
import math
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

__all__ = ["Progress"]

SILENCE = 60.0  # seconds: without validations, a line follows the one before not sooner


class Progress(ProgressBar):
    """Says how far a run is.

    On a terminal, a single bar counts optimizer steps to the last one, and shows the time left (validations included)
    and the latest metrics. Whatever is printed meanwhile goes above it. It ends before any table is printed. In a pipe
    or a log file there is one line per validation. A training without validation says a line at every twentieth of
    its way, but not more than one per minute.

    It reads metrics on logging steps alone, so it adds no synchronisation with the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Bar | None = None
        self._task: Any = None
        self._steps = math.inf
        self._begun = self._said = (0.0, 0)

    def disable(self) -> None:
        """Shows nothing; Lightning calls it on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Shows again."""
        self._enabled = True

    # --- training -----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock and the bar."""
        self._steps = float(trainer.estimated_stepping_batches)
        self._begun = self._said = (time.monotonic(), trainer.global_step)
        self._open("training", self._steps, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar."""
        step = trainer.global_step
        if self._bar is not None:
            text: dict[str, Any] = {}
            if step % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
                text["shown"] = _metrics(trainer, "train/loss", "val/loss", "val/dice")
            self._bar.update(self._task, completed=step, left=self._left(step), **text)
        elif step - self._said[1] >= self._steps / 20 and time.monotonic() - self._said[0] > SILENCE:
            self._say(trainer, _metrics(trainer, "train/loss"))

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Says in the bar that the run validates."""
        if self._bar is not None and _fitting(trainer):
            self._bar.update(self._task, description=f"validating {batch_idx + 1}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says the validation's metrics."""
        if trainer.sanity_checking:
            return
        if not _fitting(trainer):
            self._evaluated()
        elif self._bar is not None:
            shown = _metrics(trainer, "train/loss", "val/loss", "val/dice")
            self._bar.update(self._task, description="training", shown=shown)
        else:
            self._say(trainer, _metrics(trainer, *sorted(trainer.callback_metrics)))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the bar; what other callbacks print at the end comes below it."""
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, left="")
        self._close()

    def _left(self, step: int) -> str:
        """Time to the last step, at the pace so far."""
        done = step - self._begun[1]
        if done <= 0 or math.isinf(self._steps):
            return ""
        return f"{_span((time.monotonic() - self._begun[0]) / done * max(0.0, self._steps - step))} left"

    def _say(self, trainer: L.Trainer, metrics: str) -> None:
        step = trainer.global_step
        self._said = (time.monotonic(), step)
        if self._enabled:
            of = "" if math.isinf(self._steps) else f" of {self._steps:.0f} ({step / max(self._steps, 1):.0%})"
            print("; ".join(filter(None, [f"step {step}{of}", metrics, self._left(step)])), flush=True)

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens a bar, outside of training."""
        if not _fitting(trainer):
            self._open("validating", sum(trainer.num_val_batches))

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Moves the bar, outside of training."""
        if not _fitting(trainer):
            self._advance()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens a bar."""
        self._open("testing", sum(trainer.num_test_batches))

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        """Moves the bar."""
        self._advance()

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the bar before the table."""
        self._evaluated()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens a bar."""
        self._open("predicting", sum(trainer.num_predict_batches))

    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        """Moves the bar."""
        self._advance()

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the bar before what is said of the files."""
        self._evaluated()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Ends the bar before the error is shown."""
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ends a bar that is still there."""
        self._close()

    # --- the bar ------------------------------------------------------------------------------------------------------

    def _open(self, title: str, total: float, completed: int = 0) -> None:
        self._close()
        follow_stderr()
        if not self._enabled or not sys.stdout.isatty():
            return
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[shown]}", markup=False),
            console=Console(),
            refresh_per_second=4,
            redirect_stderr=sys.stderr.isatty(),
        )
        end = None if math.isinf(total) else total
        self._task = self._bar.add_task(title, total=end, completed=completed, left="", shown="")
        self._begun = (time.monotonic(), completed)
        self._steps = total
        self._bar.start()

    def _advance(self) -> None:
        if self._bar is not None:
            done = int(self._bar.tasks[0].completed) + 1
            self._bar.update(self._task, completed=done, left=self._left(done))

    def _evaluated(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, left="")
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None


class _Current:
    """Whatever standard error is when something is written; a bar puts itself in its place."""

    def write(self, text: str) -> None:
        """Writes text."""
        sys.stderr.write(text)

    def flush(self) -> None:
        """Flushes."""
        sys.stderr.flush()


def follow_stderr() -> None:
    """Lets Lightning's log messages go to the standard error of the moment, so that a bar can make room for them."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler and not isinstance(handler.stream, _Current):
                handler.setStream(_Current())


def _fitting(trainer: L.Trainer) -> bool:
    """Whether a validation is one within training."""
    return trainer.state.fn == TrainerFn.FITTING


def _metrics(trainer: L.Trainer, *names: str) -> str:
    """The latest of some metrics; of training, only the loss."""
    known = trainer.callback_metrics
    wanted = [name for name in names if name in known and (name.startswith("val/") or name == "train/loss")]
    return ", ".join(f"{name} {float(known[name]):.4g}" for name in wanted)


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
