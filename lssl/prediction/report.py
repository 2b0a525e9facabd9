"""PredictionReport: ``lssl test`` and ``lssl predict`` of a Classifier or Regressor write tables."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.table import Table

from lssl.data.clusters import subject_clusters
from lssl.data.pairs import count
from lssl.prediction.scores import Figure, by_subject
from lssl.runs.folder import back_up
from lssl.runs.outputs import Score, write_scores
from lssl.runs.predictions import prediction_folder
from lssl.runs.result_folder import ResultFolder
from lssl.utils.errors import InputError
from lssl.utils.files import atomic_write

__all__ = ["PredictionReport"]


class PredictionReport(ResultFolder):
    """Writes predictions into a folder of the cohort, ``RUN/predict/COHORT`` or ``RUN/test/COHORT``.

    ``predictions.tsv`` has a row per sample: ``subject``, ``session`` (of a pair ``first/second``), ``prediction``,
    for classes ``probability_NAME``, and ``target`` where it is known. ``subjects.tsv`` has a row per subject, the mean
    over its samples. ``lssl test`` also writes ``scores.tsv`` and prints it, and ``subject_scores.csv``: the score of
    each subject of known target (``brier`` or ``absolute_error``), and without a subject the figures of all.
    """

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores, writes, prints."""
        task: Any = pl_module
        subjects = self._write(trainer, task, "test")
        known = subjects[subjects["truth"].notna()]
        if known.empty:
            raise InputError(f"No test subject has a known {task.target}; `lssl predict` needs none.")
        figures = task.scores(known, task.clusters())
        values = {f"test/{figure.metric}": figure.value for figure in figures if figure.value == figure.value}
        pl_module.log_dict(values, batch_size=1)
        if trainer.is_global_zero:
            table = pd.DataFrame([dataclasses.asdict(figure) for figure in figures])
            _save(self.folder / "scores.tsv", table)
            self._write_scores(trainer, task, known, figures)
            Console(width=None if sys.stdout.isatty() else 100).print(_table(task.target, figures, len(known)))
            rank_zero_info(f"Predictions of {count(len(subjects), 'subject')}: {self.folder}")

    def _write_scores(self, trainer: L.Trainer, task: Any, known: pd.DataFrame, figures: Sequence[Figure]) -> None:
        table = trainer.datamodule.table  # type: ignore[attr-defined]
        clusters = subject_clusters(table[table["split"] == "test"])
        scores = [
            Score(name, "", task.target, metric, float(value), clusters.get(name, ""))
            for metric, values in task.subject_scores(known).items()
            for name, value in zip(known["subject"], values, strict=True)
        ]
        scores += [Score("", "", task.target, one.metric, one.value) for one in figures if one.value == one.value]
        write_scores(self.folder, scores, "subject_scores.csv")

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes."""
        subjects = self._write(trainer, pl_module, "predict")
        rank_zero_info(f"Predictions of {count(len(subjects), 'subject')}: {self.folder}")

    def _write(self, trainer: L.Trainer, task: Any, within: str) -> pd.DataFrame:
        predictions = task.predictions()
        if predictions.empty:
            raise InputError("There is nothing to predict from; see what was left out above.")
        subjects = by_subject(predictions, task.AVERAGE)
        if trainer.is_global_zero:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            run = Path(trainer.default_root_dir)
            self.folder = prediction_folder(run, data.location, data.table, trainer.ckpt_path, within)
            for name, rows, keys in (
                ("predictions.tsv", predictions, ["subject", "session"]),
                ("subjects.tsv", subjects, ["subject", "samples"]),
            ):
                shown = task.shown(rows)
                shown = shown if rows["truth"].notna().any() else shown.drop(columns="target")
                back_up(self.folder / name)
                _save(self.folder / name, pd.concat([rows[keys], shown], axis=1))
        return subjects


def _save(path: Path, table: pd.DataFrame) -> None:
    with atomic_write(path) as part:
        table.to_csv(part, sep="\t", index=False, float_format="%.6g", na_rep="n/a")


def _table(target: str, figures: Sequence[Figure], subjects: int) -> Table:
    table = Table("figure", title=f"{target}: {count(subjects, 'test subject')}", title_justify="left")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("subjects", justify="right")
    for figure in figures:
        interval = "" if figure.low != figure.low else f"{figure.low:.3g} to {figure.high:.3g}"
        table.add_row(figure.metric.replace("_", " "), f"{figure.value:.3g}", interval, str(figure.subjects))
    return table
