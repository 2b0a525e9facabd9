"""RepresentationMonitor: measures the representation on held-out subjects during training."""

from __future__ import annotations

import math
import time
from typing import Any, cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lssl.callbacks.held_out import held_out_batches
from lssl.evaluation.health import collapses, highest, shortcuts
from lssl.evaluation.representation import HeldOutPair, held_out_pairs, measure, trained_taps
from lssl.networks.sharding import whole
from lssl.task import Task
from lssl.utils.errors import InputError

__all__ = ["RepresentationMonitor"]

FEW = 12  # visits, below which retrieval moves in steps of more than a twelfth


class RepresentationMonitor(L.Callback):
    """Measures held-out subjects between training steps, logs ``monitor/<kind>/<tap>``, and warns.

    :mod:`lssl.evaluation.representation` says what is measured, :mod:`lssl.evaluation.health` when it warns.
    It measures the untrained network, then after a quarter and a half of ``every`` steps, then every ``every`` steps.
    It uses taps with trained weights and the same views each time; the views are read once and stay on the device.
    Processes share the subjects and pool their results. A run that ends before its first measurement has none.

    Args:
        every: steps from one measurement to the next; 0 switches the monitor off.
        subjects: most held-out subjects.
        visits: most visits of each.
        stop: end the run at a collapse, instead of warning alone.

    Attributes:
        first: figures of the untrained network; kept in checkpoints.
        best: the highest rank and retrieval of every tap so far; kept in checkpoints.
        figures: the latest ones.
        alarms: tap → the collapse that the latest two measurements show.
        spent: seconds.
    """

    def __init__(self, every: int = 200, subjects: int = 8, visits: int = 3, stop: bool = False) -> None:
        if every < 0 or subjects < 2 or visits < 1:
            raise InputError("monitor: give every 0 or more, subjects 2 or more, and visits 1 or more.")
        self.every, self.subjects, self.visits, self.stop = every, subjects, visits, stop
        self.first: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.figures: dict[str, float] = {}
        self.alarms: dict[str, str] = {}
        self.spent = 0.0
        self._cases: list[HeldOutPair] | None = None
        self._taps: list[str] = []
        self._warned: set[str] = set()
        self._suspects: dict[str, str] = {}
        self._chance = 0.0
        self._step = -1
        self._started = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads the held-out subjects and measures the network as it starts."""
        self._cases = None
        if not self.every or not isinstance(pl_module, Task):
            return
        if trainer.estimated_stepping_batches < max(1, self.every // 4):
            return
        world, rank = trainer.world_size, trainer.global_rank
        read = list(held_out_pairs(pl_module, held_out_batches(trainer), self.subjects, self.visits))
        if not read:
            rank_zero_warn("monitor: there are no held-out subjects, so nothing is measured; see data.init_args.split.")
            return
        self._chance = _chance(read)
        self._cases = [case for case in read if case.number % world == rank]
        self._taps = trained_taps(pl_module)
        self._started, self.spent, self._step = time.perf_counter(), 0.0, trainer.global_step
        if trainer.global_step == 0:
            self._measure(trainer, pl_module)
            self.first = self.figures

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures if a measurement is due."""
        step = trainer.global_step
        if self._cases is None or step == self._step or not self._due(step):
            return
        self._step = step
        whole(pl_module)
        self._measure(trainer, cast(Task, pl_module))
        self._warn(trainer, step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reports the time spent on measurements."""
        if self._cases is not None:
            share = self.spent / max(time.perf_counter() - self._started, 1e-9)
            rank_zero_info(f"The monitor took {share:.1%} of the training time ({self.spent:.1f} s).")
            for tap, text in self._suspects.items():
                if f"collapse/{tap}" not in self._warned:
                    rank_zero_warn(f"suspected collapse at {tap}, by the last measurement alone: {text}.")

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: what a resumed run compares with, and what it has warned of."""
        figures = {"first": self.first, "best": self.best, "figures": self.figures}
        return {**figures, "warned": sorted(self._warned), "suspects": self._suspects}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores this state."""
        self.first, self.figures = state_dict["first"], state_dict.get("figures", {})
        self.best, self._suspects = state_dict.get("best", {}), dict(state_dict.get("suspects", {}))
        self._warned = set(state_dict.get("warned", ()))

    def _due(self, step: int) -> bool:
        return step % self.every == 0 or step in (self.every // 4, self.every // 2)

    def _measure(self, trainer: L.Trainer, module: Task) -> None:
        start = time.perf_counter()
        with trainer.precision_plugin.forward_context():
            self.figures = measure(module, self._cases or [], self._taps, together=trainer.world_size > 1)
        known = {f"monitor/{name}": value for name, value in self.figures.items() if not math.isnan(value)}
        for logger in trainer.loggers:
            logger.log_metrics(known, step=trainer.global_step)
        self.spent += time.perf_counter() - start

    def _warn(self, trainer: L.Trainer, step: int) -> None:
        """Warns once per tap and kind; of a collapse after two measurements in a row."""
        channels = {tap: cast(Task, trainer.lightning_module).backbone.taps[tap].channels for tap in self._taps}
        chance = self._chance if step >= self.every else 1.0  # before, statistics of batch norm lag behind
        found = collapses(self.figures, self.first, self.best, channels, chance)
        self.best = highest(highest(self.best, self.first), self.figures)
        self.alarms = {tap: text for tap, text in found.items() if tap in self._suspects}
        self._suspects = found
        for word, found in (("collapse", self.alarms), ("shortcut", shortcuts(self.figures, step))):
            for tap, text in found.items():
                if f"{word}/{tap}" not in self._warned:
                    self._warned.add(f"{word}/{tap}")
                    rank_zero_warn(f"{word} at {tap}, step {step}: {text}.")
        if self.stop and self.alarms:
            trainer.should_stop = True


def _chance(cases: list[HeldOutPair]) -> float:
    """Retrieval of an embedding that knows nothing, of the measured visits; 1 if they are too few to judge."""
    visits, subjects = sum(len(case.sessions) for case in cases), len({case.number for case in cases})
    return (visits / subjects - 1) / (visits - 1) if visits >= max(FEW, subjects + 1) else 1.0
