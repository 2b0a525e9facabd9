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
    ``fold`` 0 to ``number`` - 1 test every subject once.

    Attributes:
        number: of folds, 3 or more.
        fold: the one that is tested, from 0 on.
        balance: columns whose values every fold holds in equal shares, such as ``[site, diagnosis]``: columns of the
            visit table, or names of targets. ``None``: the site, where the table has it.
    """

    number: int = 5
    fold: int = 0
    balance: list[str] | None = None

    def __post_init__(self) -> None:
        if self.number < 3 or not 0 <= self.fold < self.number:
            raise InputError(
                f"folds: give a number of 3 or more (train, val, test) and a fold from 0 to number - 1, not "
                f"{self.number} and {self.fold}."
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
    split = np.zeros(len(first), dtype=np.int8)
    split[fold == (folds.fold + 1) % folds.number] = 1
    split[fold == folds.fold] = 2
    return split
