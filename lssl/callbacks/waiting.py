"""DataWait: share of the training time spent waiting for data."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

__all__ = ["DataWait"]


class DataWait(L.Callback):
    """Says at the end of ``fit`` which share of the training steps' time went by before their batch was there.

    Counted is the time from the end of a step (or of validation, or of the epoch's preparations) to the beginning of
    the next one: fetching a batch and handing it to the device. The first batch of all is counted apart, as workers
    start for it. Where the share is high, more workers, smaller sources or a prepared folder help.

    Attributes:
        waited: seconds.
        worked: seconds in training steps.
        started: seconds for the first batch.
    """

    def __init__(self) -> None:
        self.waited = self.worked = self.started = 0.0
        self._mark = 0.0
        self._first = True

    @property
    def share(self) -> float:
        """Of the time of all steps but the first."""
        return self.waited / max(self.waited + self.worked, 1e-9)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts waiting; a run that resumes within an epoch does not start it."""
        self._mark = time.perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts waiting for the epoch's first batch."""
        self._mark = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends the wait."""
        now = time.perf_counter()
        if self._first:
            self.started += now - self._mark
        else:
            self.waited += now - self._mark
        self._mark = now

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Starts waiting for the next batch."""
        now = time.perf_counter()
        if not self._first:
            self.worked += now - self._mark
        self._mark, self._first = now, False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restarts the clock: validation counts as neither waiting nor training."""
        self._mark = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reports the share."""
        rank_zero_info(
            f"Training waited for data {self.share:.1%} of its time ({self.waited:.1f} of "
            f"{self.waited + self.worked:.1f} s; {self.started:.1f} s more for the first batch)."
        )
