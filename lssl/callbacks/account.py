"""Account: what a run's training took, in one table at its end and in cost.json."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import PassThroughProfiler, Profiler
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.flop_counter import FlopCounterMode

from lssl.callbacks.scaling import scaling
from lssl.runs.cost_table import cost_table
from lssl.runs.outputs import RunCost, write_cost
from lssl.utils.clock import Clock, DeviceTimer
from lssl.utils.peak import peak_flops, peak_memory, power
from lssl.utils.stop import Stopped

__all__ = ["Account"]

DATA, VIEWS, MODEL, OPTIMIZER, REST = STEP = ("data", "views", "model", "optimizer", "rest")
MONITOR, VALIDATION, CHECKPOINTS = BETWEEN = ("monitor", "validation", "checkpoints")
MONITORS = ("RepresentationMonitor", "Pictures", "Landmarks", "Report")
WARM_UP = 10  # steps that choose kernels and fill caches
POWER_EVERY = 10.0  # seconds
WINDOW = 20  # steps, after which waiting for data is told


class Account(L.Callback):
    """Tells where the time of training goes, and writes it to ``cost.json`` in the run folder.

    :class:`lssl.runs.outputs.RunCost` lists the figures. Lightning calls its profiler around everything it does; this
    callback wraps that profiler, so a profiler of the user's (``trainer.profiler``) goes on working. On a GPU, phases
    end with CUDA events that are read when the GPU has passed them. So no step waits for the account.

    Once, early in the run, it warns if the device waits for data more than a tenth of the time.
    """

    def __init__(self) -> None:
        self.clock: Clock | None = None
        self.steps = self.pairs = self.flops = 0
        self._first_step = self._earlier = self._kwh = 0.0
        self._started = self._power_at = 0.0
        self._watts: float | None = None
        self._window: tuple[int, int] | None = None  # its first step, and the number of the lap there
        self._lap_at: list[int] = []  # steps done at each lap

    def state_dict(self) -> dict[str, Any]:
        """Time and energy so far, for the run that resumes this one."""
        return {"seconds": self._seconds(), "kwh": self._kwh}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
        self._earlier, self._kwh = state_dict["seconds"], state_dict["kwh"]

    # --- the clock ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts."""
        self.steps = self.pairs = self.flops = 0
        self._lap_at, self._window = [], None
        self._started = self._power_at = time.perf_counter()
        self._watts = power(pl_module.device)
        self.clock = Clock(REST, DeviceTimer() if pl_module.device.type == "cuda" else None)
        own: Any = trainer
        own.profiler = _Phases(own.profiler, self)
        _state_scaling(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the step; reads the clock as far as the device has come."""
        if self.clock is None:  # concluded
            return
        self.steps, self.pairs = self.steps + 1, _pairs(batch) or self.pairs
        if self.steps == 1:
            self._first_step = time.perf_counter() - self._started
        if self.steps in (1, WARM_UP):
            self._lap(self.steps)
        self.clock.read()
        self._watch_data(trainer)
        now = time.perf_counter()
        if self._watts is not None and now - self._power_at > POWER_EVERY:
            self._add_energy(pl_module.device, trainer.world_size, now)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training pauses."""
        if self.clock is not None and not trainer.sanity_checking:
            self.clock.begin(VALIDATION)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training goes on."""
        if self.clock is not None and not trainer.sanity_checking:
            self.clock.end()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Concludes."""
        self.conclude(trainer, pl_module)

    def conclude(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the account and shows it; later steps do not count."""
        cost = self._finish(trainer, pl_module)
        if cost is not None and trainer.is_global_zero:
            rank_zero_info(cost_table(cost))
            figures = {f"cost/{name}": value for name, value in cost.figures().items()}
            for logger in trainer.loggers:
                if not isinstance(logger, CSVLogger):  # a resumed run's metrics.csv is that of an uninterrupted one
                    logger.log_metrics(figures, step=trainer.global_step)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """A run that was asked to stop has an account, too."""
        if isinstance(exception, Stopped):
            self._finish(trainer, pl_module)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _lap(self, step: int) -> None:
        assert self.clock is not None
        self.clock.lap()
        self._lap_at.append(step)

    def _seconds(self) -> float:
        return self._earlier + (time.perf_counter() - self._started if self._started else 0.0)

    def _add_energy(self, device: torch.device, processes: int, now: float) -> None:
        before, self._watts = self._watts, power(device)
        if before is not None and self._watts is not None:
            watts = processes * (before + self._watts) / 2
            self._kwh += watts * (now - self._power_at) / 3.6e6
        self._power_at = now

    def _watch_data(self, trainer: L.Trainer) -> None:
        """Tells once whether the loader keeps up, when the batches that workers had read ahead are used up."""
        assert self.clock is not None
        if self._window is None:
            workers, ahead = _workers(trainer)
            if self.steps > workers * ahead:
                self._window = self.steps, len(self._lap_at)
                self._lap(self.steps)
        elif self.steps == self._window[0] + WINDOW and len(self.clock.laps) > self._window[1]:
            before = self.clock.laps[self._window[1]]
            spent = {name: self.clock.seconds.get(name, 0.0) - before.get(name, 0.0) for name in STEP}
            text = waiting(spent, WINDOW * self.pairs * trainer.world_size, _workers(trainer)[0])
            if text:
                rank_zero_info(text)

    def _finish(self, trainer: L.Trainer, module: L.LightningModule) -> RunCost | None:
        """The account, written by the first process; ``None`` if there was no step."""
        if self.clock is None or not self.steps:
            return None
        self._add_energy(module.device, trainer.world_size, time.perf_counter())
        self.clock.begin("end")  # closes the phase that is under way
        self.clock.read(wait=True)
        cost = self._cost(trainer, module)
        self.clock = None
        if trainer.is_global_zero:
            write_cost(Path(trainer.default_root_dir), cost)
        return cost

    def _cost(self, trainer: L.Trainer, module: L.LightningModule) -> RunCost:
        assert self.clock is not None
        total = self.clock.seconds
        left_out = max((step for step in self._lap_at if step in (1, WARM_UP) and 2 * step <= self.steps), default=0)
        before = self.clock.laps[self._lap_at.index(left_out)] if left_out else {}
        timed = self.steps - left_out
        ms = {name: 1000 * (total.get(name, 0.0) - before.get(name, 0.0)) / timed for name in STEP}
        cuda = module.device.type == "cuda"
        return RunCost(
            parameters=sum(p.numel() for p in module.parameters() if p.requires_grad),
            ms_per_step=sum(ms.values()),
            **{f"ms_{name}": value for name, value in ms.items()},
            flops_per_step=self.flops,
            peak_flops=peak_flops(module.device, str(trainer.precision)),
            pairs_per_step=self.pairs,
            steps=self.steps,
            first_step=self._first_step,
            **{name: total.get(name, 0.0) for name in BETWEEN},
            seconds=self._seconds(),
            processes=trainer.world_size,
            memory=peak_memory(),
            device_memory=torch.cuda.max_memory_allocated(module.device) / 1e9 if cuda else 0.0,
            kwh=self._kwh,
        )


class _Phases(Profiler):
    """Turns the actions that Lightning reports to its profiler into phases of a clock."""

    def __init__(self, inner: Profiler, account: Account) -> None:
        super().__init__()
        self.inner: Profiler = inner.inner if isinstance(inner, _Phases) else inner  # of an earlier fit
        self.account = account
        self._silent = isinstance(self.inner, PassThroughProfiler)
        self._phases: dict[str, str | None] = {}
        self._counter: Any = None

    def start(self, action_name: str) -> None:
        """Begins the action's phase, if it has one of its own."""
        if not self._silent:
            self.inner.start(action_name)
        clock = self.account.clock
        if clock is None:
            return
        if action_name not in self._phases:
            self._phases[action_name] = phase_of(action_name)
        phase = self._phases[action_name]
        if phase is not None:
            clock.begin(clock.phase if clock.phase in BETWEEN else phase)
        elif action_name == "run_training_batch" and not self.account.steps:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def stop(self, action_name: str) -> None:
        """Ends it."""
        if self._phases.get(action_name) is not None and self.account.clock is not None:
            self.account.clock.end()
        if self._counter is not None and action_name == "run_training_batch":
            self._counter.__exit__(None, None, None)
            self.account.flops, self._counter = self._counter.get_total_flops(), None
        if not self._silent:
            self.inner.stop(action_name)

    def summary(self) -> str:
        """Of the user's profiler."""
        return self.inner.summary()

    def describe(self) -> None:
        """Lets the user's profiler report."""
        self.inner.describe()

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Of the user's profiler."""
        self.inner.setup(stage, local_rank, log_dir)

    def teardown(self, stage: str | None) -> None:
        """Of the user's profiler."""
        if hasattr(self, "inner"):
            self.inner.teardown(stage)


def phase_of(action: str) -> str | None:
    """The phase of an action of Lightning's profiler; ``None`` if it belongs to whatever surrounds it."""
    if action == VIEWS:
        return VIEWS
    if action == "save_checkpoint":
        return CHECKPOINTS
    kind, _, rest = action.removeprefix("[").partition("]")
    hook = rest.rpartition(".")[2]
    if kind == "Callback":
        return MONITOR if rest.startswith(MONITORS) else None
    if hook in ("train_dataloader_next", "batch_to_device"):
        return DATA
    if kind == "Strategy" and hook in ("training_step", "backward"):
        return MODEL
    return OPTIMIZER if hook == "optimizer_step" else None


def waiting(seconds: Mapping[str, float], pairs: int, workers: int) -> str:
    """A warning if the device waits for data for more than a tenth of the time, else empty.

    Args:
        seconds: phase of a step → its time.
        pairs: done in that time.
        workers: processes that read; without them, reading and training take turns.
    """
    waited, everything = seconds[DATA], sum(seconds.values())
    if waited <= 0.1 * everything or not pairs:
        return ""
    read = pairs / (everything if workers else waited)
    idle = len(os.sched_getaffinity(0)) - 1 - workers if hasattr(os, "sched_getaffinity") else 1
    advice = f"raise data.init_args.num_workers ({workers} now)" if idle > 0 else "each processor has a worker already"
    return (
        f"The device waits for data {waited / everything:.0%} of the time: the loader delivers {read:.3g} pairs a "
        f"second and the steps could take {pairs / max(everything - waited, 1e-9):.3g}; {advice}, read smaller boxes "
        f"(data.init_args.source_size) or prepare the data (lssl prepare)."
    )


def _state_scaling(trainer: L.Trainer) -> None:
    loader: Any = trainer.fit_loop._combined_loader
    pairs = next((each.batch_size for each in getattr(loader, "flattened", ()) if each.batch_size), 0)
    rates = [group.get("initial_lr", group["lr"]) for one in trainer.optimizers for group in one.param_groups]
    if pairs and rates and (text := scaling(pairs, trainer.world_size, trainer.accumulate_grad_batches, max(rates))):
        rank_zero_info(text)


def _workers(trainer: L.Trainer) -> tuple[int, int]:
    """Workers of the training loaders, and the batches that each reads ahead."""
    loader: Any = trainer.fit_loop._combined_loader
    loaders = [each for each in getattr(loader, "flattened", ()) if getattr(each, "num_workers", 0)]
    return sum(each.num_workers for each in loaders), max((each.prefetch_factor or 2 for each in loaders), default=0)


def _pairs(batch: Any) -> int:
    """Pairs of a batch, or of several; 0 if they cannot be counted."""
    parts = batch.values() if isinstance(batch, Mapping) else [batch]
    return sum(len(part) for part in parts if hasattr(part, "__len__"))
