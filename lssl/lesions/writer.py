"""ChangeWriter: ``lssl predict`` of a ChangeSegmenter writes label maps of change and a table of lesions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
from lightning.pytorch.utilities import rank_zero_info

from lssl.data.pairs import count
from lssl.lesions.pair import described
from lssl.lesions.report import save_table
from lssl.metrics.lesions import find_lesions
from lssl.runs.folder import back_up
from lssl.runs.predictions import prediction_folder
from lssl.runs.result_folder import ResultFolder
from lssl.segmentation.writer import entities, write_names, write_visit
from lssl.utils.distributed import every_rank

__all__ = ["ChangeWriter"]

NAME = "desc-lsslchange_dseg"


class ChangeWriter(ResultFolder):
    """Writes a BIDS derivative into a folder of the cohort, ``RUN/predict/COHORT``.

    ``sub-…/ses-…/anat/sub-…_ses-…_desc-lsslchange_dseg.nii.gz`` has the grid of the later visit's own file, as label
    maps of a Segmenter have (:class:`lssl.segmentation.writer.SegmentationWriter`); ``desc-lsslchange_dseg.tsv`` names
    its values. ``lesions.tsv`` has a row per pair and class: number of lesions and their volume. Earlier tables are
    kept under numbered names.
    """

    def __init__(self) -> None:
        self.folder = Path()
        self.rows: list[dict[str, Any]] = []
        self._subjects: dict[str, str] = {}
        self._sessions: dict[str, str] = {}

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Finds the folder; writes the names of the values."""
        self.rows, classes = [], pl_module.known_classes()
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._subjects, self._sessions = entities("sub", data.table["subject"]), entities("ses", data.table["session"])
        found = None
        if trainer.is_global_zero:
            found = prediction_folder(Path(trainer.default_root_dir), data.location, data.table, trainer.ckpt_path)
        self.folder = every_rank(found)[0]
        if trainer.is_global_zero:
            write_names(self.folder / f"{NAME}.tsv", classes)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes one label map, and counts its lesions on the grid of the file."""
        second, of = described(batch, trainer.datamodule.table)  # type: ignore[attr-defined]
        folders = [self._subjects[second["subject"]]] + [self._sessions[second["session"]]] * bool(second["session"])
        path = self.folder.joinpath(*folders, "anat", "_".join([*folders, f"{NAME}.nii.gz"]))
        label, affine = outputs.pop("label").cpu().numpy(), batch.affines[0, 1].cpu().numpy()
        label, affine = write_visit(path, label, affine, second)
        voxel = float(abs(np.linalg.det(affine[:3, :3])))
        classes = pl_module.known_classes()
        for name, values in zip(classes.names, classes.values, strict=True):
            volumes = find_lesions(label == values[0], voxel, pl_module.min_lesion)[1]
            self.rows.append({**of, "class": name, "lesions": len(volumes), "mm3": round(float(volumes.sum()), 3)})

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Joins the pairs of all processes, and writes the table."""
        ranks = every_rank(self.rows)
        if not trainer.is_global_zero:
            return
        # several processes may have seen a pair twice
        pairs = pd.DataFrame([row for rows in ranks for row in rows]).drop_duplicates(["subject", "session", "class"])
        pairs = pairs.sort_values(["subject", "session"], kind="stable")
        back_up(self.folder / "lesions.tsv")
        save_table(self.folder / "lesions.tsv", pairs)
        each = pairs.groupby(["subject", "session"])["lesions"].sum()
        lesions = f"{count(int(each.sum()), 'lesion')} in {int((each > 0).sum())} of {count(len(each), 'pair')}"
        rank_zero_info(f"Change: {lesions}: {self.folder}")
