"""AutoSave: a run loses at most some minutes, and saves when it is asked to stop."""

from __future__ import annotations

import shlex
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import distributed

from lssl.resume import at_step_boundary
from lssl.runs.lock import RunLock
from lssl.utils.errors import InputError, positive
from lssl.utils.stop import NoBatch, Stopped, StopSignals, end_soon

__all__ = ["AutoSave"]

NOTHING, SAVE, STOP = 0, 1, 2  # STOP + the number of a signal, or + LOST
LOST = 0  # the run folder was deleted or moved
LOOK = 10.0  # seconds between two looks at the run folder


class AutoSave(Checkpoint):
    """Writes ``last.ckpt`` every few minutes, and when SIGTERM, SIGUSR1 or Ctrl-C asks the run to stop.

    A run that is asked to stop finishes its step, saves, says how to go on, and exits with the status of the signal:
    143 for SIGTERM, 130 for Ctrl-C. A second Ctrl-C ends it at once. The signal with which SLURM announces the end of
    a job is left to Lightning, which saves and requeues; here it does so between two steps.

    Processes agree: one small CPU collective per step tells all what any of them was asked, one step later, so that no
    step waits for it.

    Args:
        folder: the run folder.
        max_lost: minutes between two saves; ``None`` saves only at the end of epochs and when asked to stop.
        signals: the handlers; ``None`` makes new ones.
        lock: of the folder. If it is gone, somebody has deleted or moved the folder: the run saves into a new one under
            its name, and stops.
    """

    def __init__(
        self,
        folder: Path,
        max_lost: float | None = 10.0,
        signals: StopSignals | None = None,
        lock: RunLock | None = None,
    ) -> None:
        if max_lost is not None:
            positive(max_lost=max_lost)
        self.path, self.max_lost = folder / "checkpoints" / "last.ckpt", max_lost
        self.signals, self.lock = signals or StopSignals(), lock
        self._saved = self._looked = time.monotonic()
        self._within_step = False
        self._group: Any = None
        self._pending: tuple[Any, torch.Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The lock stays in the process that took it."""
        return {**self.__dict__, "lock": None}

    # --- when ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes the folder from the trainer, where the first process has put it."""
        if self.path.parts[-2:] == ("checkpoints", "last.ckpt") and trainer.world_size > 1:
            self.path = trainer.strategy.broadcast(self.path)

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the signals over from Lightning; there is nothing to save yet."""
        self._listen(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From now on, a signal waits for the end of a step."""
        self._listen(trainer)
        self._saved, self.signals.wait = time.monotonic(), True
        if trainer.world_size > 1 and distributed.is_available() and distributed.is_initialized():
            self._group = distributed.new_group(backend="gloo")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes that weights are about to change."""
        self._within_step = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves if it is time, and stops if asked."""
        self._within_step = False
        wish = NOTHING
        if self.signals.number is not None:
            wish = STOP + self.signals.number
        elif self._lost():
            wish = STOP + LOST
        elif self.max_lost is not None and trainer.is_global_zero:
            due = time.monotonic() - self._saved >= 60 * self.max_lost
            wish = SAVE if due and at_step_boundary(trainer) else NOTHING
        agreed = self._agree(wish)
        if agreed == SAVE:
            self._save(trainer)
        elif agreed > SAVE:
            self._stop(trainer, agreed - STOP)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stops within a validation, which is made again on resuming; of several processes, each may have another."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and self._group is None and self.signals.number is not None:
            self._stop(trainer, self.signals.number)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """``last.ckpt`` has just been written."""
        self._saved = time.monotonic()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All is saved; a signal that came late still counts."""
        self.signals.wait = False
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None
        if self.signals.number is not None and self._group is None:
            raise Stopped(self.signals.number)
        if self.lock is not None and self.lock.lost:
            raise InputError(_lost_sentence(self.path))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Between two steps all is done that was begun, even if the next batch never comes, or the folder is gone."""
        asked, self.signals.wait = self.signals.number, False
        if isinstance(exception, OSError) and self.lock is not None and self.lock.lost:
            if not self._within_step and self._group is None:
                self._stop(trainer, LOST)
            return
        if asked is not None and isinstance(exception, NoBatch):
            end_soon(128 + asked)
            if self._group is not None:  # the others wait for this process in a step: none of them can save
                raise Stopped(asked)
        stopping = isinstance(exception, Stopped) or asked is None
        if not stopping and not self._within_step and self._group is None and isinstance(exception, RuntimeError):
            self._stop(trainer, asked or 0)

    # --- what ---------------------------------------------------------------------------------------------------------

    def _lost(self) -> bool:
        now = time.monotonic()
        if self.lock is None or now - self._looked < LOOK:
            return False
        self._looked = now
        return self.lock.lost

    def _listen(self, trainer: L.Trainer) -> None:
        requeue = _requeue_signal(trainer)
        self.signals.listen(*([] if requeue is None else [requeue]))

    def _agree(self, wish: int) -> int:
        """The largest wish of all processes, of the step before if there are several."""
        if self._group is None:
            return wish
        agreed = NOTHING
        if self._pending is not None:
            self._pending[0].wait()
            agreed = int(self._pending[1])
        if agreed > SAVE:
            self._pending = None
            return agreed
        value = torch.tensor(NOTHING if agreed == wish == SAVE else wish)  # it is being saved now
        work = distributed.all_reduce(value, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, value)
        return agreed

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved = time.monotonic()

    def _stop(self, trainer: L.Trainer, number: int) -> None:
        if number == _requeue_signal(trainer):
            self.signals.number = None
            trainer._signal_connector._slurm_sigusr_handler_fn(number, None)  # type: ignore[arg-type]
            return
        self._save(trainer)
        if number == LOST:
            if trainer.is_global_zero:
                raise InputError(_lost_sentence(self.path))
            raise SystemExit(0)
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        config = self.path.parent.parent / "config.yaml"
        command = (
            f" Go on with: lssl fit --config {shlex.quote(str(config))} --ckpt_path last" if config.is_file() else ""
        )
        rank_zero_info(f"Stopped by {name} at step {trainer.global_step}; saved to {self.path}.{command}")
        if trainer.is_global_zero:
            raise Stopped(number)
        raise SystemExit(0)  # the first process has the status; Lightning would kill it if another one had failed


def _lost_sentence(path: Path) -> str:
    return (
        f"{path.parent.parent} was deleted or moved while the run was writing into it, so the run stops. {path} holds "
        "all that was learned; what else the folder held is no longer there."
    )


def _requeue_signal(trainer: L.Trainer) -> int | None:
    """With which SLURM announces the end of a job that Lightning requeues."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return int(environment.requeue_signal or signal.SIGUSR1)
    return None
