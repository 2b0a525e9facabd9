"""SkippedReads: says how many pairs could not be read and were skipped."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lssl.data.pairs import count
from lssl.data.read_errors import skipped_reads

__all__ = ["SkippedReads"]


class SkippedReads(L.Callback):
    """Warns at the end of an epoch and of a command when ``data.init_args.on_error: skip`` has skipped pairs.

    Attributes:
        number: of pairs that this command has skipped so far.
    """

    def __init__(self) -> None:
        self.number = self._earlier = self._known = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Counts from here on: a resumed run continues the list."""
        self._earlier, self.number, self._known = len(skipped_reads(trainer.default_root_dir)), 0, 0

    def _count(self, trainer: L.Trainer, last: bool = False) -> None:
        """Warns of visits that are new, and of the number at the end."""
        rows = skipped_reads(trainer.default_root_dir)[self._earlier :]
        known, self.number = len({tuple(row[:2]) for row in rows}), len(rows)
        if known > self._known or (last and rows):
            self._known = known
            first, why, _ = rows[0]
            rank_zero_warn(
                f"{count(self.number, 'pair')} skipped so far because of visits that cannot be read, the first being "
                f"{first} ({why.rstrip('.')}); all are in {trainer.default_root_dir}/skipped_reads.csv."
            )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After an epoch of training."""
        self._count(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After the run."""
        self._count(trainer, last=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After validation."""
        self._count(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After the test."""
        self._count(trainer)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After prediction."""
        self._count(trainer)
