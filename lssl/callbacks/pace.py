"""Pace: pairs a second over some steps, after which the run stops."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch

__all__ = ["Pace"]


class Pace(L.Callback):
    """Times whole steps, waiting for the device at both ends, and stops the run.

    The first steps are left out: they start workers, choose kernels and compile.

    Args:
        seconds: stops after so long, but not before ``fewest`` steps.
        warm_up: steps left out.
        fewest: steps timed at least.
        most: steps timed at most.

    Attributes:
        pairs_per_second: of this process; 0 before the end.
    """

    def __init__(self, seconds: float = 5.0, warm_up: int = 3, fewest: int = 3, most: int = 100) -> None:
        self.seconds, self.warm_up, self.fewest, self.most = seconds, warm_up, fewest, most
        self.pairs_per_second = 0.0
        self._steps = self._pairs = 0
        self._began = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the step."""
        self._steps += 1
        timed = self._steps - self.warm_up
        if timed > 0:
            parts = batch.values() if isinstance(batch, dict) else [batch]
            self._pairs += sum(len(part) for part in parts if hasattr(part, "__len__"))
        if timed == 0:
            _wait(pl_module.device)
            self._began = time.perf_counter()
        elif timed >= self.most or (timed >= self.fewest and time.perf_counter() - self._began > self.seconds):
            _wait(pl_module.device)
            self.pairs_per_second = self._pairs / (time.perf_counter() - self._began)
            trainer.should_stop = True


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
