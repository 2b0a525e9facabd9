"""ChangeReport: ``lssl test`` of a ChangeSegmenter scores lesions, and draws every pair."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.table import Table

from lssl.data.clusters import subject_clusters
from lssl.data.pairs import count
from lssl.lesions.pair import described
from lssl.metrics.lesions import LesionScores, lesion_scores
from lssl.prediction.scores import Figure, mean_interval
from lssl.runs.folder import back_up
from lssl.runs.outputs import Score, write_scores
from lssl.runs.predictions import prediction_folder
from lssl.runs.result_folder import ResultFolder
from lssl.utils.files import atomic_write

__all__ = ["ChangeReport", "save_table", "scores_of", "summarise_lesions"]

#: Figures of pairs with true lesions, and of pairs without; shares are at most 1.
CHANGED, UNCHANGED = ("sensitivity", "precision", "f1", "dice"), ("false_lesions", "false_volume")
COUNTED = ("true_lesions", "found", "lesions", "confirmed", "false_lesions")
VOLUMES = ("true_volume", "volume", "false_volume")


class ChangeReport(ResultFolder):
    """Writes scores into a folder of the cohort, ``RUN/test/COHORT``.

    ``lesions.tsv`` has a row per pair and class (:class:`lssl.metrics.lesions.LesionScores`), ``scores.tsv`` the
    summary over subjects with 95 % intervals (:func:`summarise_lesions`), ``subject_scores.csv`` what it is a summary
    of (:func:`scores_of`), ``pictures`` one of every pair.
    """

    def __init__(self) -> None:
        self.folder = Path()
        self.rows: list[dict[str, Any]] = []

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts anew; finds the folder."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        run = Path(trainer.default_root_dir)
        self.folder = prediction_folder(run, data.location, data.table, trainer.ckpt_path, "test")
        self.rows = []

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Scores and draws a pair."""
        from lssl.lesions.picture import draw_pair

        second, of = described(batch, trainer.datamodule.table)  # type: ignore[attr-defined]
        truth, predicted = (outputs[name].cpu().numpy() for name in ("truth", "predicted"))
        predicted = np.where(truth < 0, 0, predicted)  # nobody knows what is true there
        affine = batch.affines[0, 1].cpu().numpy()
        voxel = float(abs(np.linalg.det(affine[:3, :3])))
        for number, name in enumerate(pl_module.classes.names, 1):
            options = pl_module.min_lesion, pl_module.min_overlap
            scores = lesion_scores(predicted == number, truth == number, voxel, *options)
            self.rows.append({**of, "class": name, **_columns(scores)})
        images = [batch.picture(0, number).cpu().numpy() for number in range(2)]
        path = self.folder / "pictures" / f"{second['subject']}_{second['session']}.png"
        draw_pair(
            f"{second['subject']} {of['session']}", images, batch.affines[0].cpu().numpy(), truth, predicted, path
        )

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes tables, logs and prints the summary."""
        pairs = pd.DataFrame(self.rows)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        clusters = subject_clusters(data.table.drop(columns="site", errors="ignore"))
        summary = summarise_lesions(pairs, clusters)
        of_tested = subject_clusters(data.table[data.table["split"] == "test"])
        write_scores(self.folder, scores_of(pairs, of_tested), "subject_scores.csv")
        for name, table in (("lesions.tsv", pairs), ("scores.tsv", summary)):
            back_up(self.folder / name)
            save_table(self.folder / name, table)
        known = summary[summary["value"].notna()]
        names = (f"test/{row['class']}/{row.metric}" for _, row in known.iterrows())
        pl_module.log_dict(dict(zip(names, known["value"], strict=True)), batch_size=1)
        Console(width=None if sys.stdout.isatty() else 100).print(_table(summary, pairs))
        number = len(pairs.drop_duplicates(["subject", "session"]))
        rank_zero_info(f"Scores of {count(number, 'pair')}: {self.folder}, pictures included.")


def scores_of(pairs: pd.DataFrame, clusters: dict[str, str]) -> list[Score]:
    """The figures of single pairs that :func:`summarise_lesions` averages; those that are not defined are left out.

    Args:
        pairs: the rows of ``lesions.tsv``.
        clusters: subject → cluster of related subjects.
    """
    return [
        Score(
            str(row["subject"]),
            row["session"],
            row["class"],
            metric,
            float(row[metric]),
            clusters.get(row["subject"], ""),
        )
        for row in pairs.to_dict("records")
        for metric in (CHANGED if row["true_lesions"] else UNCHANGED)
        if row[metric] == row[metric]
    ]


def summarise_lesions(pairs: pd.DataFrame, clusters: dict[str, str]) -> pd.DataFrame:
    """Rows ``class``, ``metric``, ``value``, ``low``, ``high`` and ``subjects``, as in :class:`.scores.Figure`.

    Sensitivity, precision, F1 and Dice are means over subjects of the means over their pairs with a true lesion. Where
    nothing is predicted, there is no precision. False lesions and their volume (mm³) are those of pairs without a true
    lesion. Intervals are t-intervals, see :func:`lssl.prediction.scores.mean_interval`; there is none if all subjects
    are equal.

    Args:
        pairs: the rows of ``lesions.tsv``.
        clusters: subject → cluster of related subjects.
    """
    rows = []
    for name, own in pairs.groupby("class", sort=False):
        for metrics, part in ((CHANGED, own["true_lesions"] > 0), (UNCHANGED, own["true_lesions"] == 0)):
            for metric in metrics:
                values = own[part].groupby("subject", sort=False)[metric].mean().dropna()
                figure = _figure(metric, values, clusters, 1.0 if metrics is CHANGED else float("inf"))
                rows.append({"class": name, **dataclasses.asdict(figure)})
    return pd.DataFrame(rows)


def _figure(metric: str, values: pd.Series, clusters: dict[str, str], most: float) -> Figure:
    if values.empty:
        return Figure(metric, float("nan"))
    low, high = mean_interval(values.to_numpy(float), [clusters.get(name, name) for name in values.index])
    mean = float(values.mean())
    if not high > low:
        return Figure(metric, mean, subjects=len(values))
    return Figure(metric, mean, low, min(high, most), len(values))


def _columns(scores: LesionScores) -> dict[str, float]:
    return {name: getattr(scores, name) for name in (*COUNTED, "sensitivity", "precision", "f1", "dice", *VOLUMES)}


def save_table(path: Path, table: pd.DataFrame) -> None:
    """Writes a TSV atomically; unknown values are ``n/a``."""
    with atomic_write(path) as part:
        table.to_csv(part, sep="\t", index=False, float_format="%.6g", na_rep="n/a")


def _table(summary: pd.DataFrame, pairs: pd.DataFrame) -> Table:
    number = len(pairs.drop_duplicates(["subject", "session"]))
    title = f"Test: {count(number, 'pair')} of {count(pairs['subject'].nunique(), 'subject')}"
    table = Table("class", "figure", title=title, title_justify="left")
    for head in ("value", "95 % interval", "subjects"):
        table.add_column(head, justify="right")
    number_text: Callable[[float], str] = "{:.3g}".format
    for _, row in summary.iterrows():
        value = "–" if row["value"] != row["value"] else number_text(row["value"])
        interval = "" if row["low"] != row["low"] else f"{number_text(row['low'])} to {number_text(row['high'])}"
        what = row["metric"].replace("_", " ") + (", mm³" if row["metric"] == "false_volume" else "")
        where = " (pairs without change)" if row["metric"] in UNCHANGED else ""
        table.add_row(str(row["class"]), what + where, value, interval, str(row["subjects"]))
    return table
