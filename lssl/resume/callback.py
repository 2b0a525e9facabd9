"""ExactResume: an interrupted and resumed run equals the uninterrupted one, to the bit on a CPU."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parallel import DistributedDataParallel

from lssl.data.loading import continue_training
from lssl.resume.place import at_step_boundary, place_of, validation_due, write_place
from lssl.resume.rows import forget_later_events, forget_step, logged_text, open_row, restore_text
from lssl.resume.state import gradients, random_state, set_gradients, set_random_state, set_sums, sums
from lssl.utils.distributed import every_rank

__all__ = ["ExactResume"]

KEY = "exact_resume"


class ExactResume(L.Callback):
    """Makes every checkpoint one from which training continues exactly, whichever hook writes it.

    A checkpoint then also holds: the epoch and the batches of it that the training loop has used (never what workers
    have prefetched), whether a validation is still due, the global random numbers of every rank, the gradients and sums
    of an accumulated step, and the rows of metrics.csv. On resuming, samples that were used are not read again, a
    validation that was due is made, and metrics.csv continues from these rows. What the interrupted run logged after
    its last checkpoint is thereby replaced.

    Every :class:`lssl.task.Task` adds this callback. It moves to the front of the trainer's callbacks, so that random
    numbers are restored before others draw some. The number of processes must stay the same for an exact run.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._validated = -1  # batches done when the latest validation ended
        self._extra_step = False
        self._before: tuple[int, list[str]] = -1, []  # batches done and log before a validation that a stop caused

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Moves to the front."""
        own: Any = trainer
        own.callbacks = [self, *(callback for callback in own.callbacks if callback is not self)]

    # --- saving -------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds what resuming needs; all ranks take part."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        place = place_of(trainer)
        is_open = place.in_epoch and place.after_batch and place.batches > 0
        validation = is_open and self._validated != place.total and validation_due(trainer)
        own: dict[str, Any] = {"random": random_state(pl_module.device)}
        if not at_step_boundary(trainer):
            own |= {"gradients": gradients(pl_module), "sums": sums(pl_module)}
        waiting = self._loaded is not None and len(self._loaded["ranks"]) == trainer.world_size
        text = self._before[1] if self._before[0] == place.total else logged_text(trainer)
        checkpoint[KEY] = {
            "ranks": self._loaded["ranks"] if self._loaded and waiting else every_rank(own),
            "batches": place.all_batches,
            "open": is_open,
            "validated": -1 if validation else place.total,
            "text": text,
            "row": open_row(trainer, place),
        }
        write_place(checkpoint["loops"]["fit_loop"], place, validation)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes what was logged before a validation that only happens because the run stops."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._restore(trainer, pl_module)
        self._end_extra_step(trainer)
        if trainer.should_stop and not validation_due(trainer):
            self._before = place_of(trainer).total, logged_text(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes that this validation is done."""
        if not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self._validated = place_of(trainer).total

    # --- resuming -----------------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores the log, and the place before anything asks for the training data."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if KEY not in checkpoint:
            rank_zero_warn("The checkpoint does not hold its exact place, so the resumed run may see other samples.")
            return
        self._loaded = checkpoint[KEY]
        self._validated = self._loaded["validated"]
        restore_text(trainer, self._loaded["text"], self._loaded["row"])
        forget_later_events(trainer, checkpoint["global_step"])
        trainer.fit_loop.load_state_dict(checkpoint["loops"]["fit_loop"])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lets Lightning begin if only the end after the last step is missing; it would do nothing."""
        loop = trainer.fit_loop.epoch_loop
        if self._loaded is not None and self._loaded["open"] and trainer.global_step == loop.max_steps:
            loop.max_steps += 1
            self._extra_step = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks that the loaders start at the place; those made before it was known are set to it."""
        if self._loaded is None:
            return
        loop: Any = trainer.fit_loop
        validation = loop.epoch_loop.val_loop
        if self._extra_step and not (self._validated < 0 and validation_due(trainer) and sum(validation.max_batches)):
            validation._has_run = loop.epoch_loop.batch_progress.is_last_batch = True  # only the epoch's end is missing
        if continue_training([each for each in loop._combined_loader.flattened if hasattr(each, "sampler")], trainer):
            iter(loop._data_fetcher)
        place, found, ranks = place_of(trainer), self._loaded["batches"], len(self._loaded["ranks"])
        if ranks != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint is from {ranks} processes and this run has {trainer.world_size}, so it is not the run "
                "that an uninterrupted one would have been."
            )
        if place.batches and found != place.all_batches:
            rank_zero_warn(
                f"The checkpoint lies within an epoch of {found} batches and this run's epochs have "
                f"{place.all_batches}: batch size, data or devices have changed, so other samples follow than in an "
                "uninterrupted run."
            )

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restores the random numbers of a checkpoint between epochs."""
        self._restore(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restores those of a checkpoint within an epoch, and corrects the step that Lightning logs at."""
        self._restore(trainer, pl_module)
        _correct_step(trainer)
        forget_step(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restores what is not restored yet, if only the end of an epoch was missing, before others save."""
        self._restore(trainer, pl_module)
        self._end_extra_step(trainer)
        _correct_step(trainer)

    def _end_extra_step(self, trainer: L.Trainer) -> None:
        if self._extra_step:
            loop: Any = trainer.fit_loop
            loop.epoch_loop.max_steps -= 1
            progress = loop.epoch_loop.batch_progress
            progress.is_last_batch = progress.current.processed >= loop.max_batches
            self._extra_step = False

    def _restore(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Once, at the first hook after everything is set up, which may itself have drawn random numbers."""
        state, self._loaded = self._loaded, None
        if state is None or len(state["ranks"]) != trainer.world_size:
            return
        own = state["ranks"][trainer.global_rank]
        set_random_state(own["random"], pl_module.device)
        set_gradients(pl_module, own.get("gradients", {}))
        set_sums(pl_module, own.get("sums", {}))
        if "sums" in own and isinstance(wrapped := trainer.strategy.model, DistributedDataParallel):
            wrapped.require_forward_param_sync = False  # it would give the first rank's sums to all


def _correct_step(trainer: L.Trainer) -> None:
    """Sets the step that Lightning logs at, of which it counts one too many or too few after resuming."""
    if trainer.lightning_module.automatic_optimization:
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
