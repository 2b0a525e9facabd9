"""Cost: time, memory and operations of a run's steps, in ``cost.json`` (see :class:`lssl.runs.outputs.RunCost`)."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.flop_counter import FlopCounterMode

from lssl.runs.outputs import RunCost, write_cost

__all__ = ["Cost"]


class Cost(L.Callback):
    """Counts parameters and times the training steps, waiting for data included and validation excluded.

    The device is synchronised only before the first and after the last timed step. :class:`lssl.runs.outputs.RunCost`
    lists what is written at the end of ``fit``.

    Args:
        warm_up: steps that are not timed, because they choose kernels and fill caches of visits.
    """

    def __init__(self, warm_up: int = 10) -> None:
        self.warm_up = warm_up
        self.pairs = self.steps = self.timed = 0
        self.seconds = 0.0
        self.flops = 0
        self._mark: float | None = None
        self._counter: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The clock starts."""
        self._mark = _now(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Counts the operations of the first step, which is not timed."""
        if self.steps == 0 and self._counter is None:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts steps; the clock restarts after the warm-up."""
        if self._counter is not None and self.steps == 0:
            self._counter.__exit__(None, None, None)
            self.flops = self._counter.get_total_flops()
        self.steps, self.timed = self.steps + 1, self.timed + 1
        self.pairs = sum(map(len, batch.values())) if isinstance(batch, Mapping) else len(batch)
        if self.steps == self.warm_up < trainer.max_steps:
            self.seconds, self.timed, self._mark = 0.0, 0, _now(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The clock stops."""
        if self._mark is not None:
            self.seconds, self._mark = self.seconds + _now(pl_module) - self._mark, None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The clock goes on."""
        if trainer.training:
            self._mark = _now(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes."""
        self.on_validation_start(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        on_gpu = pl_module.device.type == "cuda"
        cost = RunCost(
            parameters=sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            ms_per_step=1000 * self.seconds / max(1, self.timed),
            flops_per_step=self.flops,
            pairs_per_step=self.pairs,
            steps=self.steps,
            memory=_most_memory(),
            device_memory=torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
        )
        write_cost(Path(trainer.default_root_dir), cost)


def _most_memory() -> float:
    """``ru_maxrss`` alone is wrong: Linux starts it at the parent's memory when this process was started."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9


def _now(module: L.LightningModule) -> float:
    if module.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
