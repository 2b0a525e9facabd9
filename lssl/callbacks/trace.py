"""Trace: what the device and the host do in a few steps, as a file for a trace viewer and as a table of operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities import rank_zero_info
from torch.profiler import ProfilerActivity, profile, record_function

from lssl.callbacks.account import Account

__all__ = ["TRACE", "Trace", "operations_table"]

TRACE = "trace.json.gz"


class Trace(L.Callback):
    """After some steps, ends the :class:`~lssl.callbacks.Account`, traces a few more, and stops the run.

    Tracing slows steps down, so the account is of the steps before. The trace goes into the run folder as
    ``trace.json.gz``: https://ui.perfetto.dev and chrome://tracing show it. What Lightning's profiler and
    :meth:`lssl.task.Task.phase` enclose has a bar of its own. In Python, list it after the account.

    Args:
        after: steps before the trace.
        steps: steps in the trace.
        top: operations in the table.
    """

    def __init__(self, after: int = 30, steps: int = 3, top: int = 10) -> None:
        self.after, self.steps, self.top = after, steps, top
        self._seen = 0
        self._profiler: Any = None
        self._trainers: Any = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begins or ends the trace."""
        self._seen += 1
        if self._seen == self.after:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, Account):
                    callback.conclude(trainer, pl_module)
            self._begin(trainer, pl_module.device)
        elif self._profiler is not None and self._seen == self.after + self.steps:
            self._end(trainer, pl_module.device)
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends a trace that is shorter than planned, because the run ended."""
        self._end(trainer, pl_module.device)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives the profiler back."""
        self._stop(trainer)

    def _begin(self, trainer: L.Trainer, device: torch.device) -> None:
        on = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profiler = profile(activities=on)
        self._profiler.start()
        own: Any = trainer
        self._trainers, own.profiler = own.profiler, _Spans()

    def _stop(self, trainer: L.Trainer) -> Any:
        found, self._profiler = self._profiler, None
        if found is not None:
            own: Any = trainer
            own.profiler = self._trainers
            found.stop()
        return found

    def _end(self, trainer: L.Trainer, device: torch.device) -> None:
        found = self._stop(trainer)
        if found is None or not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / TRACE
        path.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(path))
        steps = self._seen - self.after
        rank_zero_info(operations_table(found.key_averages(), steps, self.top, device.type == "cuda"))
        rank_zero_info(f"Trace of {steps} step{'s'[: steps > 1]}: {path} (open it at https://ui.perfetto.dev)")


class _Spans(PassThroughProfiler):
    """Gives each action of Lightning's profiler a bar in the trace."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[str, Any] = {}

    def start(self, action_name: str) -> None:
        """Begins its bar."""
        self._open[action_name] = record_function(action_name).__enter__()

    def stop(self, action_name: str) -> None:
        """Ends it."""
        span = self._open.pop(action_name, None)
        if span is not None:
            span.__exit__(None, None, None)


def operations_table(averages: Any, steps: int, top: int, device: bool) -> str:
    """The operations that take most, with their own time (that of operations within them is theirs).

    Args:
        averages: of ``torch.profiler``, one per operation.
        steps: traced.
        top: how many to list.
        device: times of the device instead of the host's.
    """
    name = "self_device_time_total" if device else "self_cpu_time_total"
    found = [one for one in averages if not one.is_user_annotation and getattr(one, name) > 0]
    total = sum(getattr(one, name) for one in found)
    where = "GPU" if device else "CPU"
    rows = [("operation", f"{where} ms/step", "share", "calls/step")]
    for one in sorted(found, key=lambda one: -getattr(one, name))[:top]:
        spent = getattr(one, name)
        key = one.key if len(one.key) <= 60 else f"{one.key[:59]}…"
        rows.append((key, f"{spent / 1000 / steps:.2f}", f"{spent / total:.0%}", f"{one.count / steps:.4g}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([f"What takes most of {len(found)} kinds of operations:", *(f"  {line}" for line in lines)])
