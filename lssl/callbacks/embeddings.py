"""EmbeddingWriter: ``lssl predict`` with a strategy leaves one array of embeddings per tap."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from lssl.data.pairs import count
from lssl.runs.predictions import prediction_folder
from lssl.runs.result_folder import ResultFolder
from lssl.runs.visit_log import VisitLog
from lssl.utils.distributed import every_rank

__all__ = ["EmbeddingWriter"]


class EmbeddingWriter(BasePredictionWriter, ResultFolder):
    """Writes ``embeddings.npz`` into a folder of the cohort, ``RUN/predict/COHORT``.

    It holds ``subject`` and ``session`` (names), ``age``, and ``(visits, channels)`` per tap. With several processes
    each writes the visits it saw, ``embeddings.1.npz`` and so on. ``visits.tsv`` lists the visits
    (:class:`lssl.runs.visit_log.VisitLog`).

    Attributes:
        folder: of the cohort, once written (:func:`lssl.runs.predictions.prediction_folder`).
    """

    def __init__(self) -> None:
        super().__init__("epoch")
        self.folder = Path()
        self.visits = VisitLog()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins the list of visits."""
        self.visits = VisitLog()

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Lists the visit."""
        if isinstance(outputs, dict) and "session" in outputs:
            self.visits.add(batch)
        super().on_predict_batch_end(trainer, pl_module, outputs, batch, *args)

    def write_on_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Joins the batches, finds the visits' names in the table, writes once and whole."""
        if not predictions or not isinstance(predictions[0], dict) or "session" not in predictions[0]:
            return
        joined = {name: torch.cat([p[name] for p in predictions]).float().cpu().numpy() for name in predictions[0]}
        rows = joined.pop("session").astype(int)
        joined.pop("subject")
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        visits = data.table.iloc[rows]
        arrays: dict[str, Any] = {name: visits[name].to_numpy(str) for name in ("subject", "session")}
        arrays |= {"age": visits["age"].to_numpy(float), **joined}
        found = None
        if trainer.is_global_zero:
            found = prediction_folder(Path(trainer.default_root_dir), data.location, data.table, trainer.ckpt_path)
        self.folder = every_rank(found)[0]
        path = self.folder / ("embeddings.npz" if trainer.global_rank == 0 else f"embeddings.{trainer.global_rank}.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez_compressed(part, **arrays)
        part.replace(path)
        self.visits.write(self.folder, data.table)
        rank_zero_info(f"Embeddings of {count(len(rows), 'visit')}: {path}")
