"""SegmentationReport: ``lssl test`` of a Segmenter writes a table, a CSV and a picture per subject."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.table import Table

from lssl.data.clusters import subject_clusters
from lssl.data.pairs import count
from lssl.runs.outputs import Score, write_scores
from lssl.runs.predictions import prediction_folder
from lssl.runs.result_folder import ResultFolder
from lssl.segmentation.scores import METRICS, SegmentedVisit, score_subject
from lssl.segmentation.volumes import later_visit

__all__ = ["SegmentationReport", "averages"]

#: Columns of the table; :data:`lssl.segmentation.scores.METRICS` has their full names.
HEADS = {
    "dice": "↑\nDice",
    "hd95": "↓ HD95\nmm",
    "asd": "↓ ASD\nmm",
    "missed": "↓ not\nfound",
    "aspc": "ASPC, %\n(true)",
    "stcs": "STCS\n(true)",
    "trajectory_error": "↓ rate\nerror\n%/y",
    "reversal_rate": "↓ re-\nversals",
}


class SegmentationReport(ResultFolder):
    """Scores each test subject when all its visits are segmented, and shows the averages at the end.

    ``RUN/test/COHORT`` holds ``segmentation.csv`` with every value (subject, session, structure, metric, value,
    cluster; see :data:`lssl.segmentation.scores.METRICS`), and ``pictures`` with one per subject.

    Attributes:
        folder: of the cohort (:func:`lssl.runs.predictions.prediction_folder`).
    """

    def __init__(self) -> None:
        self.folder = Path()
        self.rows: list[Score] = []
        self._subject = ""
        self._visits: list[SegmentedVisit] = []

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts anew; finds the folder."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        run = Path(trainer.default_root_dir)
        self.folder = prediction_folder(run, data.location, data.table, trainer.ckpt_path, "test")
        self.rows, self._subject, self._visits = [], "", []

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps a visit; the visits of a subject follow one another."""
        batch = later_visit(batch)
        visit = trainer.datamodule.table.iloc[int(batch.session[0, 1])]  # type: ignore[attr-defined]
        if visit["subject"] != self._subject:
            self._finish(trainer, pl_module)
            self._subject = visit["subject"]
        truth = outputs["truth"]
        self._visits.append(
            SegmentedVisit(
                session=visit["session"],
                age=float(batch.ages[0, 0]),
                time=float(batch.times[0, 0]),
                ordered=bool(visit["ordered_by"]),
                affine=batch.affines[0, 1].cpu(),
                image=batch.picture(0, 1).cpu(),
                predicted=outputs["predicted"].cpu(),
                truth=None if truth is None or bool((truth < 0).all()) else truth.cpu(),
            )
        )

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores the last subject, then writes files, log and table."""
        self._finish(trainer, pl_module)
        table = write_scores(self.folder, self.rows)
        means = averages(table)
        whole = means.loc["mean"].dropna().to_dict()
        pl_module.log_dict({f"test/{metric}": value for metric, value in whole.items()}, batch_size=1)
        Console(width=None if sys.stdout.isatty() else 100).print(_table(means))
        rank_zero_info(f"Scores of {count(table['subject'].nunique(), 'subject')}: {self.folder}, pictures included.")

    def _finish(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not self._visits:
            return
        from lssl.segmentation.picture import draw_subject

        names = pl_module.classes.names
        table = trainer.datamodule.table  # type: ignore[attr-defined]
        cluster = subject_clusters(table[table["split"] == "test"]).get(self._subject, "")
        scores = score_subject(self._subject, self._visits, names)
        self.rows += [dataclasses.replace(score, cluster=cluster) for score in scores]
        draw_subject(self._subject, self._visits, len(names), self.folder / "pictures" / f"{self._subject}.png")
        self._visits = []


def averages(table: pd.DataFrame) -> pd.DataFrame:
    """Structures × metrics: the mean over subjects of each subject's mean, and the mean over structures.

    Args:
        table: the rows of ``segmentation.csv``.
    """
    table = table[table["metric"].isin(list(METRICS))]
    order = table["structure"].unique()
    by_subject = table.groupby(["structure", "metric", "subject"])["value"].mean()
    means = by_subject.groupby(["structure", "metric"]).mean().unstack("metric").reindex(order)
    means = means[[metric for metric in METRICS if metric in means]]
    return pd.concat([means, means.mean().to_frame("mean").T])


def _table(means: pd.DataFrame) -> Table:
    """Readable at 80 columns: the truth's own value stands in brackets behind what it is the truth of."""
    table = Table("structure", title="Test subjects: mean over subjects", title_justify="left", padding=0)
    shown = [metric for metric in HEADS if metric in means]
    for metric in shown:
        table.add_column(HEADS[metric], justify="right", no_wrap=True)
    for structure, values in means.iterrows():
        if structure == "mean":
            table.add_section()
        texts = [_text(values[metric]) for metric in shown]
        true = [f" ({_text(values[f'true_{metric}'])})" if f"true_{metric}" in means else "" for metric in shown]
        table.add_row(str(structure), *map("".join, zip(texts, true, strict=True)))
    return table


def _text(value: float) -> str:
    return "–" if value != value else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
