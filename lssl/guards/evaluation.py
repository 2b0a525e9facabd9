"""EvaluationGuard: validation, test and prediction refuse terms and voxels that are not finite."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.strategies import ParallelStrategy
from torch import distributed

from lssl.guards.culprits import forget_terms, images_finite, named_visits, odd_visits, some, table_of
from lssl.utils.errors import InputError

__all__ = ["EvaluationGuard"]


class EvaluationGuard(L.Callback):
    """Stops at a term or a voxel that is not finite, because figures must rest on the same visits each time.

    Test and prediction stop before they use such a batch. Validation stops after all batches, on all ranks together.
    A network can give finite scores for an image with NaN, so the images are checked and not only the terms.
    """

    def __init__(self) -> None:
        self._problems: list[str] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts anew."""
        self._problems = []

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Forgets the terms of the batch before."""
        forget_terms(pl_module)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Notes what is not finite."""
        if found := _problem(trainer, pl_module, batch):
            self._problems.append(found)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops if any rank has noted something, before a checkpoint is chosen by these figures."""
        problems: list[Any] = [self._problems]
        if isinstance(trainer.strategy, ParallelStrategy) and trainer.world_size > 1:
            problems = [None] * trainer.world_size
            distributed.all_gather_object(problems, self._problems)
        everyone = list(dict.fromkeys(problem for part in problems for problem in part))
        if everyone:
            more = f" ({len(everyone) - 1} more batches are not finite.)" if len(everyone) > 1 else ""
            raise InputError(f"Validation after step {trainer.global_step}: {everyone[0]}{more}")

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Refuses a visit whose voxels are not finite."""
        forget_terms(pl_module)
        _refuse(trainer, pl_module, batch, "Test")

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Refuses terms that are not finite."""
        _refuse(trainer, pl_module, batch, "Test")

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Refuses a visit whose voxels are not finite."""
        forget_terms(pl_module)
        _refuse(trainer, pl_module, batch, "Prediction")


def _refuse(trainer: L.Trainer, module: L.LightningModule, batch: Any, what: str) -> None:
    if found := _problem(trainer, module, batch):
        raise InputError(f"{what}: {found}")


def _problem(trainer: L.Trainer, module: L.LightningModule, batch: Any) -> str:
    """A sentence on a batch whose voxels or terms are not finite; empty if all are."""
    table = table_of(trainer)
    if not images_finite(batch):
        odd = [phrase for phrase in odd_visits(batch, table) if "NaN" in phrase]
        return f"{'; '.join(odd)}; repair the file, or leave the visit out (data.init_args.exclude)."
    terms: dict[str, Any] = getattr(module, "latest_terms", {})
    bad = [f"{name} is {float(value):g}" for name, value in terms.items() if not value.isfinite().all()]
    if not bad:
        return ""
    return (
        f"{', '.join(bad)} for {some(named_visits(batch, table))}, whose voxels are finite; the weights may have "
        f"diverged: go on from an earlier checkpoint with a lower learning rate."
    )
