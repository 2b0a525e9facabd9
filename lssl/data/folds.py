"""Cross-validation by subject: every subject is tested once, in folds of equal composition."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lssl.utils.errors import InputError

__all__ = ["Folds", "deal", "fold_splits"]


@dataclass
class Folds:
    """One fold of a cross-validation by subject.

    Subjects are dealt to the folds. Fold ``fold`` is tested, the next one validates, the others train. So the runs with
    ``fold`` 0 to ``number`` - 1 test every subject once. Where labels are few, ``train`` says how many folds train,
    those after the validating one, and all others are tested: the runs then train on every subject equally often.

    Attributes:
        number: of folds, 3 or more.
        fold: the one that is tested, from 0 on.
        balance: columns whose values every fold holds in equal shares, such as ``[site, diagnosis]``: columns of the
            visit table, or names of targets. ``None``: the site, where the table has it.
        train: folds to train on; ``None`` takes all but the tested and the validating one.
    """

    number: int = 5
    fold: int = 0
    balance: list[str] | None = None
    train: int | None = None

    def __post_init__(self) -> None:
        if self.number < 3 or not 0 <= self.fold < self.number:
            raise InputError(
                f"folds: give a number of 3 or more (train, val, test) and a fold from 0 to number - 1, not "
                f"{self.number} and {self.fold}."
            )
        if self.train is not None and not 1 <= self.train <= self.number - 2:
            raise InputError(
                f"folds: train is {self.train}; of {self.number} folds, 1 to {self.number - 2} can train, as one is "
                f"tested and one validates."
            )


def deal(names: Sequence[str], strata: Sequence[str], number: int, seed: int) -> np.ndarray:
    """Deals subjects to folds: each stratum and all subjects together are divided as evenly as counts allow.

    Subjects are sorted by stratum and then by a hash of seed and name, and dealt in turn. Subjects of one stratum are
    neighbours, so its counts in two folds differ by at most 1; so do all counts. A subject's fold changes if others of
    its cohort come or go.

    Args:
        names: subjects.
        strata: one for each subject.
        number: of folds.
        seed: another seed gives another deal.

    Returns:
        ``(subjects,)`` fold of each, from 0 on.
    """
    hashes = [hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).hexdigest() for name in names]
    order = sorted(range(len(names)), key=lambda place: (strata[place], hashes[place]))
    fold = np.empty(len(names), dtype=np.int64)
    fold[order] = np.arange(len(names)) % number
    return fold


def fold_splits(table: pd.DataFrame, subject: np.ndarray, folds: Folds, seed: int) -> np.ndarray:
    """``(subjects,)`` 0, 1 or 2 for train, val and test.

    Args:
        table: sorted visits; a subject's stratum is the first known value of each column.
        subject: ``(visits,)`` number of each row's subject.
        folds: which fold is tested.
        seed: of the deal.
    """
    columns = folds.balance if folds.balance is not None else ["site"] if "site" in table else []
    if missing := [name for name in columns if name not in table]:
        raise InputError(
            f"folds: there is no column '{missing[0]}' to balance; the visits have {', '.join(map(str, table))}."
        )
    if "split" in table:
        raise InputError("folds deal the subjects anew, but the table has a column split; drop one of the two.")
    first = table.groupby(subject)[["subject", *columns]].first()  # the first value that is not missing
    if len(first) < folds.number:
        raise InputError(f"folds: {len(first)} subjects cannot be dealt to {folds.number} folds; ask for fewer.")
    several = np.bincount(subject) > 1  # so that few subjects with pairs do not all fall into one fold
    values = first[columns].astype(object).where(first[columns].notna(), "").astype(str).to_numpy().tolist()
    strata = ["\t".join([str(pair), *row]) for pair, row in zip(several, values, strict=True)]
    fold = deal(first["subject"].astype(str).tolist(), strata, folds.number, seed)
    train = folds.number - 2 if folds.train is None else folds.train
    place = (fold - folds.fold) % folds.number  # 0 is tested, 1 validates
    return np.where(place == 1, 1, np.where((place >= 2) & (place < 2 + train), 0, 2)).astype(np.int8)
