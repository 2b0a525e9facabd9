"""Held-out pairs for callbacks, whatever the source of data."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden

from lssl.data.batch import PairBatch

__all__ = ["held_out_batch", "held_out_batches"]


def held_out_batches(trainer: L.Trainer) -> Iterable[PairBatch]:
    """All validation batches, unsplit between processes; nothing if the source of data has none."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if data is None or not is_overridden("val_dataloader", data, L.LightningDataModule):
        return []
    return data.val_dataloader()


def held_out_batch(trainer: L.Trainer, number: int) -> PairBatch | None:
    """A validation batch as float32 on the CPU; ``None`` if there are fewer."""
    batch = next(islice(held_out_batches(trainer), number, None), None)
    return None if batch is None else batch.to("cpu")
