"""Where a run stands: epoch, batches of it that are done, and whether a validation is still due.

Lightning's own progress depends on the hook that saves. It resumes from some hooks as if the validation of the last
batch had been done, or as if an epoch that was stopped had been finished. :func:`write_place` rewrites the progress in
a checkpoint into forms that Lightning resumes exactly:

- between epochs: all counts of epochs are equal, and those of batches are 0;
- within an epoch: one more epoch is started than processed, and all counts of batches are equal;
- with a validation due: in addition, one batch of validation is started and not processed, so Lightning begins anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L

__all__ = ["Place", "at_step_boundary", "place_of", "validation_due", "write_place"]

COUNTS = ("ready", "started", "processed", "completed")


@dataclass(frozen=True)
class Place:
    """Where a run stands.

    Attributes:
        epoch: number of the current epoch, or of the next one between epochs.
        batches: how many of its batches are done; 0 between epochs.
        all_batches: how many batches the epoch has.
        total: batches done in all epochs.
        after_batch: the latest batch is done, and the next one has not begun.
        in_epoch: the epoch has not ended; an epoch that a stop cut short has ended before its last batch.
    """

    epoch: int
    batches: int
    all_batches: float
    total: int
    after_batch: bool
    in_epoch: bool


def place_of(trainer: L.Trainer) -> Place:
    """Where a trainer stands now; a batch that has begun counts as not done."""
    loop: Any = trainer.fit_loop
    epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress
    done, in_epoch = batches.current.processed, epochs.started > epochs.processed
    epoch = epochs.processed
    if not in_epoch:  # the counts are those of the epoch before, which may have been stopped before its end
        stopped = 0 < done < loop.max_batches and not batches.is_last_batch
        epoch, done = (epoch - 1, done) if stopped else (epoch, 0)
    after = batches.current.ready == batches.current.processed
    return Place(epoch, done, loop.max_batches, batches.total.processed, after, in_epoch)


def at_step_boundary(trainer: L.Trainer) -> bool:
    """Whether no gradient is in flight, so that a checkpoint written now is small.

    Callbacks may ask this in ``on_train_batch_end``. A checkpoint within an accumulated step is as exact as any other,
    but it holds the gradients of all ranks.
    """
    place, every = place_of(trainer), trainer.accumulate_grad_batches
    return place.batches % every == 0 or place.batches >= place.all_batches


def validation_due(trainer: L.Trainer) -> bool:
    """Whether Lightning validates after the latest batch, even without a stop."""
    loop: Any = trainer.fit_loop
    stop, trainer.should_stop = trainer.should_stop, False
    try:
        return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))
    finally:
        trainer.should_stop = stop


def write_place(progress: dict[str, Any], place: Place, validation: bool) -> None:
    """Rewrites Lightning's progress; see the module.

    Args:
        progress: ``checkpoint["loops"]["fit_loop"]``.
        place: where the run stands.
        validation: whether the validation of the latest batch is still to be done.
    """
    started = place.epoch + (place.batches > 0)
    earlier = progress["epoch_progress"]["total"]["processed"] - progress["epoch_progress"]["current"]["processed"]
    epochs = {"ready": started, "started": started, "processed": place.epoch, "completed": place.epoch}
    progress["epoch_progress"] = {
        "current": epochs,
        "total": {name: earlier + count for name, count in epochs.items()},
    }
    progress["epoch_loop.batch_progress"] = {
        "current": dict.fromkeys(COUNTS, place.batches),
        "total": dict.fromkeys(COUNTS, place.total),
        "is_last_batch": place.batches >= place.all_batches,
    }
    begun = {name: int(validation and name in ("ready", "started")) for name in COUNTS}
    progress["epoch_loop.val_loop.batch_progress"] = {"current": begun, "total": dict(begun), "is_last_batch": False}
    progress["state_dict"].pop("combined_loader", None)  # the place says it all; see PairLoader
