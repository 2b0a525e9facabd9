"""FiniteGuard: finds a loss or gradient that is not finite, names its visits, and stops the run or skips the update.

**Finding.** Each step copies its terms and the largest gradient to the host without waiting for the device. The guard
reads them one step later, when the device has long computed them, and reads all of them on logging steps, before
validation and before a checkpoint. One more batch stays in memory for this, so the offending one can be saved.

**Ranks.** A loss that is not finite gets a gradient of NaN. The ranks' mean of the gradients is then NaN on every rank,
so all ranks see the same step without another exchange. Only then do they exchange their findings.

**Skipping** (``skip``) undoes the update on the device: weights, optimizer state and buffers (running statistics,
queues) keep their values from before the step, by :func:`torch.where`. This costs a copy of them. With accumulation,
the update of all its batches is skipped. On a GPU, an optimizer that counts its steps on the host (Adam without
``fused`` or ``capturable``) counts a skipped step; nothing else remains of it. The learning rate's schedule goes on.

**Float16** (``16-mixed``): an overflow of the gradient with a finite loss belongs to the GradScaler, which skips the
update and lowers its scale. The guard acts on a loss that is not finite, and after :data:`MOST` overflows in a row.

**Checkpoints** with weights or optimizer state that are not finite are never written.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed
from torch.optim import Optimizer

from lssl.data.pairs import count
from lssl.guards.culprits import forget_terms, named_visits, odd_visits, save_batch, some, table_of
from lssl.guards.finite import largest_of, not_finite, of_all_ranks
from lssl.utils.distributed import local
from lssl.utils.errors import InputError

__all__ = ["FiniteGuard"]

FOLDER = "nonfinite"  # in the run folder
GRADIENT = "the gradient"
LAG = 1  # steps between a step and the reading of its values
MOST = 30  # updates in a row that may be skipped
NAMED = 4  # visits that a sentence names
SAVED = 5  # batches that a run saves


@dataclass
class _Record:
    """What a training step leaves to be read."""

    step: int
    number: int
    names: list[str]
    values: Tensor
    copied: Any
    updated: bool
    batch: Any

    def read(self) -> dict[str, float]:
        """Name → value; waits until the device has computed it."""
        if self.copied is not None:
            self.copied.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


class FiniteGuard(L.Callback):
    """Stops a run, or skips an update, if a loss term or the gradient is not finite.

    A sentence names the term, the step and the visits, and says which visits look wrong. The batch is saved in the run
    folder, below ``nonfinite/``, and a skipped update gets a row in ``nonfinite/skipped.csv``.

    Args:
        on_nonfinite: ``stop`` or ``skip``.

    Attributes:
        skipped: number of updates skipped so far; kept in checkpoints.
    """

    def __init__(self, on_nonfinite: Literal["stop", "skip"] = "stop") -> None:
        if on_nonfinite not in ("stop", "skip"):
            raise InputError(f"on_nonfinite is {on_nonfinite!r}; choose stop or skip.")
        self.on_nonfinite = on_nonfinite
        self.skipped = 0
        self._saved = self._in_a_row = self._step = 0
        self._batch: tuple[int, Any] = 0, None
        self._pending: deque[_Record] = deque()
        self._suspect: tuple[_Record, dict[str, float]] | None = None
        self._largest: Tensor | None = None
        self._finite: Tensor | None = None
        self._before: list[tuple[Tensor, Tensor | None]] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._never_finite: set[str] = set()
        self._hooks: list[Any] = []

    # --- training -----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses weights that are not finite before the first step."""
        broken = of_all_ranks(not_finite(dict(pl_module.named_parameters())))
        if broken:
            raise InputError(
                f"The weights are not finite before the first step ({some(broken)}); start from another checkpoint."
            )
        self._never_finite = set(not_finite(dict(pl_module.named_buffers())))
        self._pending.clear()
        self._suspect, self._buffers = None, []
        if self.on_nonfinite == "skip":
            self._hooks = [each.register_step_post_hook(self._undo) for each in trainer.optimizers]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the buffers as they are before an update's first batch."""
        self._step, self._batch = trainer.global_step + 1, (batch_idx, batch)
        self._largest = None
        forget_terms(pl_module)
        if self.on_nonfinite == "skip" and not self._buffers:
            self._buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Gives a loss that is not finite a gradient of NaN, which reaches all ranks."""
        if loss.requires_grad:
            finite = loss.detach().isfinite()
            loss.register_hook(lambda gradient: torch.where(finite, gradient, torch.nan))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Measures the gradient; with ``skip``, prepares that a bad update can be undone."""
        groups = optimizer.param_groups
        weights = [weight for group in groups for weight in group["params"] if weight.grad is not None]
        largest = largest_of([weight.grad for weight in weights])
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
        if self.on_nonfinite != "skip":
            return
        self._finite = finite = self._largest.isfinite()
        with torch.no_grad():
            bad = ~finite
            for weight in weights:
                local(weight.grad).masked_fill_(bad, 0)
            for buffer, before in self._buffers:
                torch.where(finite, buffer, before, out=buffer)
            self._buffers = []
            kept = [*map(local, weights), *(value for weight in weights for value in _state(optimizer, weight))]
            self._before = [(tensor, tensor.detach().clone()) for tensor in kept]
            self._before += [(weight, None) for weight in weights if not optimizer.state.get(weight)]

    @torch.no_grad()
    def _undo(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """After the optimizer's step: a bad one leaves no trace; state that it made anew is 0."""
        if self._finite is None:  # a step that torch makes to save sharded state before the first one
            return
        bad = ~self._finite
        for tensor, before in self._before:
            if before is not None:
                torch.where(self._finite, tensor, before, out=tensor)
                continue
            for value in _state(optimizer, tensor):
                value.masked_fill_(bad, 0)
        self._before = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sends this step's values to the host, and reads those of earlier steps."""
        self._record(pl_module, outputs)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._read(trainer, pl_module, 0 if every and self._step % every == 0 else LAG)

    def _record(self, module: L.LightningModule, outputs: Any = None) -> None:
        """Sends the values of the latest step, once: another callback may save before the step has ended for this."""
        terms = _terms(module, outputs)
        updated = self._largest is not None
        if terms or updated:
            values = [*terms.values(), *([self._largest] if self._largest is not None else [])]
            host, copied = _to_host(torch.stack([value.detach().float() for value in values]))
            names = [*terms, *([GRADIENT] if updated else [])]
            number, batch = self._batch
            self._pending.append(_Record(self._step, number, names, host, copied, updated, batch))
        self._largest, self._batch = None, (0, None)
        forget_terms(module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads all values before the weights are validated."""
        self._read(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads all values."""
        self._read(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads all values, and says how many updates were skipped."""
        self._read(trainer, pl_module)
        if self.skipped:
            rank_zero_warn(f"{count(self.skipped, 'update')} skipped, see {_folder(trainer) / 'skipped.csv'}.")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lets go of the optimizers and of batches."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._before, self._buffers, self._suspect = [], [], [], None
        self._pending.clear()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses to save weights or optimizer state that are not finite."""
        if trainer.training:
            self._record(pl_module)
        self._read(trainer, pl_module)
        tensors = {name: value for name, value in checkpoint["state_dict"].items() if name not in self._never_finite}
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for place, weight in enumerate(group["params"]):
                    tensors |= {f"optimizer {place} {n}": v for n, v in enumerate(_state(optimizer, weight))}
        if broken := of_all_ranks(not_finite(tensors)):
            raise InputError(
                f"After step {trainer.global_step}, the weights ({some(broken)}) are not finite, so no "
                f"checkpoint is written: the updates are too large. {_advice(trainer, odd=False)}"
            )

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: what is counted."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting."""
        self.skipped = state_dict["skipped"]

    # --- reading ------------------------------------------------------------------------------------------------------

    def _read(self, trainer: L.Trainer, module: L.LightningModule, leave: int = 0) -> None:
        """Reads the values of all steps but the latest ``leave``."""
        while len(self._pending) > leave:
            record = self._pending.popleft()
            values = record.read()
            bad = {name: value for name, value in values.items() if not abs(value) < torch.inf}
            terms = {name: value for name, value in bad.items() if name != GRADIENT}
            if terms and self._suspect is None:
                self._suspect = record, terms
            if record.updated:
                if GRADIENT in bad:
                    self._judge(trainer, module, record)
                else:
                    self._in_a_row = 0
                self._suspect = None

    def _judge(self, trainer: L.Trainer, module: L.LightningModule, record: _Record) -> None:
        """Stops, or counts a skipped update; every rank that reduces gradients comes here at the same step."""
        self._in_a_row += 1
        suspects: list[tuple[str, str] | None] = [self._report(trainer, *self._suspect) if self._suspect else None]
        if isinstance(trainer.strategy, ParallelStrategy) and trainer.world_size > 1:
            mine, suspects = suspects[0], [None] * trainer.world_size
            distributed.all_gather_object(suspects, mine)
        found = next((one for one in suspects if one), None)
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if found is None and scaled and self._in_a_row < MOST:
            return  # the scaler has skipped the update
        sentence, advice = found or self._report(trainer, record, {GRADIENT: float("nan")})
        if self._in_a_row >= MOST:
            raise InputError(f"{MOST} updates in a row were not finite, the last one so: {sentence} {advice}")
        if self.on_nonfinite == "stop":
            raise InputError(f"{sentence} {advice}")
        self.skipped += 1
        rank_zero_warn(f"{sentence} This update is skipped.")
        if trainer.is_global_zero:
            _add_row(_folder(trainer) / "skipped.csv", {"step": record.step, "why": sentence})

    def _report(self, trainer: L.Trainer, record: _Record, bad: Mapping[str, float]) -> tuple[str, str]:
        """Saves the batch; says what is not finite, where, which visits look wrong, and what to do."""
        table = table_of(trainer)
        odd, names = odd_visits(record.batch, table), named_visits(record.batch, table)
        words = [f"{name} is {value:g}" if name != GRADIENT else f"{name} is not finite" for name, value in bad.items()]
        parts = [f"Step {record.step}: {', '.join(words)}"]
        parts.append("; ".join(odd[:NAMED]) if odd else f"the visits {some(names)} hold nothing unusual")
        if self._saved < SAVED:
            self._saved += 1
            path = _folder(trainer) / f"step{record.step}-rank{trainer.global_rank}.pt"
            try:
                facts = {"step": record.step, "batch_idx": record.number, "visits": names, "values": dict(bad)}
                save_batch(path, record.batch, **facts)
                parts.append(f"the batch is in {path}")
            except (InputError, OSError) as error:
                parts.append(f"the batch could not be saved ({str(error).rstrip('.')})")
        return "; ".join(parts) + ".", _advice(trainer, bool(odd))


def _terms(module: L.LightningModule, outputs: Any) -> dict[str, Tensor]:
    """Terms of the latest step of a task, or the loss that a step of one's own returned."""
    if terms := getattr(module, "latest_terms", None):
        return dict(terms)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return {"loss": loss} if isinstance(loss, Tensor) else {}


def _to_host(values: Tensor) -> tuple[Tensor, Any]:
    """Values on the host, and the event after which they are there; ``None`` if they are there already."""
    if values.device.type != "cuda":
        return values.cpu(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied


def _state(optimizer: Optimizer, weight: Tensor) -> list[Tensor]:
    """Tensors that an optimizer keeps of a weight, on its device: a step counted on the host is left alone."""
    values = [local(value) for value in optimizer.state.get(weight, {}).values() if isinstance(value, Tensor)]
    return [value for value in values if value.device == weight.device]


def _advice(trainer: L.Trainer, odd: bool) -> str:
    """What to do about odd visits, or about a training that diverges; and where good weights are."""
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    ways = (
        "Repair such a visit or leave it out (data.init_args.exclude)"
        if odd
        else f"Lower the learning rate ({rate:.3g} now) or clip the gradient (trainer.gradient_clip_val)"
    )
    last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    kept = f" {last} holds weights from before." if last.is_file() else ""
    return f"{ways}, or skip such updates (model.init_args.on_nonfinite: skip).{kept}"


def _folder(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / FOLDER


def _add_row(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row to a CSV file, which it begins with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)
