"""Samples of a prediction: which visits, or pairs of visits, a task learns from and is scored on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from lssl.data.pairs import SPLITS, count

__all__ = ["SampleKind", "Samples", "choose_samples"]

SampleKind = Literal["one", "first", "pair"]


@dataclass(frozen=True)
class Samples:
    """Rows of the visit table, ``(samples, 2)`` each; one visit is given as a pair of itself.

    Attributes:
        known: split → samples whose target is known.
        every: all samples, for prediction.
        notes: phrases that count what was left out.
    """

    known: dict[str, np.ndarray]
    every: np.ndarray
    notes: list[str]


def choose_samples(
    table: pd.DataFrame, subject: np.ndarray, pairs: np.ndarray, kind: SampleKind, values: np.ndarray | None, name: str
) -> Samples:
    """The samples of a kind. A sample has the target of its visit, a pair that of its later one.

    Args:
        table: sorted visits with ``split``, ``time`` and ``ordered_by``.
        subject: ``(visits,)`` number of each row's subject.
        pairs: ``(pairs, 2)`` rows of all pairs.
        kind: every visit (``one``), the ``first`` visit of each subject whose order is known, or every ``pair`` whose
            interval is known and above 0.
        values: ``(visits,)`` target, NaN where unknown; ``None`` makes every target unknown.
        name: of the target.
    """
    notes, rows = [], np.arange(len(table))
    if kind == "pair":
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        time = table["time"].to_numpy(float)
        usable = time[pairs[:, 1]] - time[pairs[:, 0]] > 0  # false for NaN
        if not usable.all():
            notes.append(f"{count(int((~usable).sum()), 'pair')} without a known interval above 0 left out")
        every = pairs[usable]
        if alone := len(np.unique(subject)) - len(np.unique(subject[every[:, 0]])):
            notes.append(f"{count(alone, 'subject')} without a pair left out")
    else:
        every = np.stack([rows, rows], 1)
        if kind == "first":
            ordered = (table["ordered_by"].to_numpy() != "") | (np.bincount(subject)[subject] == 1)
            first = np.diff(subject, prepend=-1) != 0
            if lost := int((first & ~ordered).sum()):
                notes.append(f"{count(lost, 'subject')} left out, whose first visit is not known")
            every = every[first & ordered]
    told = np.zeros(len(table), bool) if values is None else ~np.isnan(values)
    told_of_sample = told[every[:, 1]]
    split = table["split"].astype(str).to_numpy()[every[:, 0]]
    if values is not None and not told_of_sample.all():
        without = set(subject[every[:, 0]]) - set(subject[every[told_of_sample, 0]])
        what = count(int((~told_of_sample).sum()), "pair" if kind == "pair" else "visit")
        notes.append(f"{what} without {name} left out ({count(len(without), 'subject')} altogether)")
    known = {part: every[told_of_sample & (split == part)].astype(np.int32) for part in SPLITS}
    return Samples(known, every.astype(np.int32), notes)
