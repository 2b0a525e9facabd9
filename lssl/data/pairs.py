"""From a visit table to pairs of its rows: order, policies, intervals and splits, without a loop over subjects.

Everything here is numpy on a table sorted by :func:`order_visits`: the visits of one subject are neighbours, in time
order, so a subject is a slice and a pair is two row numbers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from lssl.data.labels import visit_ranks
from lssl.utils.errors import InputError

__all__ = [
    "ORDERED_POLICIES",
    "PairIndex",
    "build_pairs",
    "count",
    "evenly",
    "given_split",
    "item_name",
    "name_bytes",
    "order_notes",
    "order_visits",
    "split_subjects",
    "subject_splits",
    "summarise",
    "visit_name",
    "visit_names",
]

SPLITS = ("train", "val", "test")
ORDERED_POLICIES = ("consecutive", "baseline")


def count(number: int, noun: str) -> str:
    """A number with its noun: ``1 pair``, ``2 pairs``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def item_name(visits: int, number: int = 1) -> str:
    """What a dataset gives at a time: ``pair``, or ``pairs`` if they are several; ``series of 3 visits``."""
    return f"series of {visits} visits" if visits > 2 else "pair" if number == 1 else "pairs"


def visit_name(table: pd.DataFrame, row: int) -> str:
    """The name of a visit in messages: ``sub-01 ses-02``."""
    return f"{table['subject'].iat[row]} {table['session'].iat[row]}".strip()


def visit_names(table: pd.DataFrame, rows: np.ndarray) -> dict[int, str]:
    """Row → name of its visit in messages."""
    return {int(row): visit_name(table, int(row)) for row in rows}


def name_bytes(table: pd.DataFrame) -> np.ndarray:
    """``(visits,)`` :func:`visit_name` of every row as UTF-8, which workers share without copying."""
    columns = (table[name].astype(str).tolist() for name in ("subject", "session"))
    return np.array([f"{subject} {session}".strip().encode() for subject, session in zip(*columns, strict=True)])


def order_visits(table: pd.DataFrame) -> pd.DataFrame:
    """Checks a visit table and sorts it by subject, then time.

    If the times of a subject's visits are not all known, the session labels give the order (see
    :func:`lssl.data.labels.label_keys`). If the labels give none or contradict the known times, the subject is
    *unordered*: its visits are sorted by label, numbers by value, and nothing may rely on that order.

    Args:
        table: one row per visit, with the columns subject, session, age, time and, if the split is given, split.

    Returns:
        The sorted table with rows numbered from 0, and the column ``ordered_by``: ``time``, ``words``, ``numbers``, or
        empty for unordered subjects.
    """
    if table.empty:
        raise InputError("The visit table is empty: there is nothing to make pairs of.")
    for column in ("subject", "session"):
        missing = np.flatnonzero(table[column].isna())
        if len(missing):
            raise InputError(f"Row {missing[0] + 1} of the visit table has no {column}; fill it in or remove the row.")
    subject, _ = pd.factorize(table["subject"], sort=True)
    session, labels = pd.factorize(table["session"])
    _refuse_duplicates(table, subject, session)
    time = table["time"].to_numpy(float)
    if "ordered_by" not in table:
        rank, known = visit_ranks(subject, table["session"].tolist(), time)
        table = table.assign(visit_rank=rank, ordered_by=known)
    natural = np.argsort(np.argsort([_natural(label) for label in labels], kind="stable"))[session]
    order = np.lexsort((natural, time, table["visit_rank"].to_numpy(float), subject))  # NaN comes last
    return table.iloc[order].reset_index(drop=True)


def order_notes(table: pd.DataFrame) -> list[str]:
    """Notes on a sorted table: which subjects have no known order, and which are ordered by labels alone."""
    notes = []
    for how, text in (
        ("", "whose visits have no known order and time (no date, age, or word such as baseline)"),
        ("numbers", "whose visits are ordered by the number in their session label, as no time is known"),
        ("words", "whose visits are ordered by the words of their session labels, as no time is known"),
    ):
        names = table["subject"][(table["ordered_by"] == how).to_numpy()].unique()
        if len(names):
            sessions = table["session"][(table["subject"] == names[0]).to_numpy()]
            notes.append(f"{count(len(names), 'subject')} {text}, such as {names[0]}: {', '.join(sessions)}")
    return notes


def _natural(label: str) -> str:
    """A key under which the numbers of a label sort by value."""
    return re.sub(r"\d+", lambda number: number[0].zfill(12), label)


def _refuse_duplicates(table: pd.DataFrame, subject: np.ndarray, session: np.ndarray) -> None:
    code = subject.astype(np.int64) * (session.max() + 1) + session
    first, number = np.unique(code, return_index=True, return_counts=True)[1:]
    repeated = np.flatnonzero(number > 1)
    if len(repeated):
        name = visit_name(table, int(first[repeated[0]]))
        raise InputError(
            f"Duplicate visit: {name} stands {number[repeated[0]]} times in the visit table "
            f"({count(len(repeated), 'such visit')} in all); keep one row per visit."
        )


class PairIndex:
    """The pairs of a sorted visit table, and why other rows form none.

    Attributes:
        subject: ``(visits,)`` int32, number of each row's subject.
        pairs: ``(pairs, 2)`` int32, rows of true pairs in time order, sorted by subject; of series ``(series, K)``.
        singles: ``(singles,)`` int32, rows of subjects that have one visit.
        excluded: phrases with counts, one per reason.
    """

    def __init__(self, subject: np.ndarray, pairs: np.ndarray, singles: np.ndarray, excluded: list[str]) -> None:
        self.subject, self.pairs, self.singles, self.excluded = subject, pairs, singles, excluded


def build_pairs(table: pd.DataFrame, policy: str, min_interval: float, max_interval: float | None) -> PairIndex:
    """Pairs of a table sorted by :func:`order_visits`.

    Args:
        table: the visit table.
        policy: ``any`` and ``all``: every two visits of a subject; ``consecutive``: neighbours in time;
            ``baseline``: the first visit with each later one. The last two need an order: unordered subjects give no
            pair, and these are counted.
        min_interval: shortest interval in years.
        max_interval: longest interval in years; ``None``: no limit.

    Returns:
        The pairs and single visits, and why pairs were left out.
    """
    subject, names = pd.factorize(table["subject"])
    visits = np.bincount(subject, minlength=len(names))
    first = np.cumsum(visits) - visits
    pairs = _candidates(subject, first, visits, policy)
    keep, excluded = _interval_filter(table["time"].to_numpy(float), pairs, min_interval, max_interval)
    if policy in ORDERED_POLICIES and "ordered_by" in table:
        unordered = (table["ordered_by"].to_numpy() == "")[pairs[:, 0]]
        if unordered.any():
            excluded.insert(
                0, f"{count(int(unordered.sum()), 'pair')} of unordered visits, as pairs: {policy} needs an order"
            )
        keep &= ~unordered
    paired = np.bincount(subject[pairs[keep, 0]], minlength=len(names)) > 0
    lost = int(((visits > 1) & ~paired).sum())
    if lost:
        excluded.append(f"{count(lost, 'subject')} with several visits but no pair left")
    singles = first[visits == 1].astype(np.int32)
    return PairIndex(subject.astype(np.int32), pairs[keep].astype(np.int32), singles, excluded)


def _candidates(subject: np.ndarray, first: np.ndarray, visits: np.ndarray, policy: str) -> np.ndarray:
    rows = np.arange(len(subject))
    if policy == "consecutive":
        earlier = np.flatnonzero(subject[1:] == subject[:-1])
        return np.stack([earlier, earlier + 1], 1)
    if policy == "baseline":
        later = rows[rows != first[subject]]
        return np.stack([first[subject[later]], later], 1)
    if policy not in ("any", "all"):
        raise InputError(f"pairs is {policy!r}; choose any, consecutive, baseline or all.")
    later_visits = first[subject] + visits[subject] - 1 - rows
    earlier = np.repeat(rows, later_visits)
    step = np.arange(len(earlier)) - np.repeat(np.cumsum(later_visits) - later_visits, later_visits)
    return np.stack([earlier, earlier + 1 + step], 1)


def _interval_filter(
    time: np.ndarray, pairs: np.ndarray, shortest: float, longest: float | None
) -> tuple[np.ndarray, list[str]]:
    """Which pairs keep within the limits, and counts of those that do not, by reason."""
    limit = np.inf if longest is None else longest
    interval = time[pairs[:, 1]] - time[pairs[:, 0]]
    # Without limits, an unknown interval is harmless. With limits, it cannot be shown to keep within them.
    unknown = np.isnan(interval) & (shortest > 0 or longest is not None)
    short, long = interval < shortest - 1e-9, interval > limit + 1e-9
    reasons = {
        f"closer than min_interval ({shortest:g} years)": short,
        f"further apart than max_interval ({limit:g} years)": long,
        "of unknown interval, which the limits on the interval do not allow": unknown,
    }
    phrases = [f"{count(int(bad.sum()), 'pair')} {reason}" for reason, bad in reasons.items() if bad.any()]
    return ~(short | long | unknown), phrases


def split_subjects(names: Sequence[str], group: np.ndarray, fractions: Sequence[float], seed: int) -> np.ndarray:
    """Divides subjects over train, val and test.

    A subject's split depends on the seed and its name, not on the order of the table. Each group (subjects with pairs,
    subjects with one visit) is divided by the fractions, so that few true pairs do not all fall into one split. A group
    of three or more gives val at least one subject, unless val's share is 0.

    Args:
        names: subjects.
        group: ``(subjects,)`` group of each subject.
        fractions: shares of train, val and test.
        seed: another seed gives another division.

    Returns:
        ``(subjects,)`` 0, 1 or 2 for train, val and test.
    """
    hashes = [hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest() for name in names]
    order = np.argsort(np.frombuffer(b"".join(hashes), dtype=">u8"), kind="stable")
    split = np.zeros(len(names), dtype=np.int8)
    for value in np.unique(group):
        members = order[group[order] == value]
        val, test = (round(share * len(members)) for share in fractions[1:])
        if fractions[1] > 0 and len(members) >= 3:
            val = max(val, 1)
        if fractions[0] > 0:  # rounding must not take the only subjects from training
            val, test = min(val, len(members) - 1), min(test, max(len(members) - 1 - val, 0))
        split[members[:val]] = 1
        split[members[val : val + test]] = 2
    if fractions[1] > 0 and len(names) >= 3 and not (split == 1).any():
        largest = np.bincount(group).argmax()
        split[order[group[order] == largest][0]] = 1
    return split


def given_split(table: pd.DataFrame, subject: np.ndarray) -> np.ndarray:
    """``(subjects,)`` 0, 1 or 2 from the table's column ``split``, which must agree within a subject."""
    code = pd.Index(SPLITS).get_indexer(pd.Index(table["split"]))
    wrong = np.flatnonzero(code < 0)
    if len(wrong):
        raise InputError(
            f"The split of {visit_name(table, int(wrong[0]))} is {table['split'].iat[wrong[0]]!r}; "
            f"the column split may only hold train, val and test."
        )
    first = np.flatnonzero(np.diff(subject, prepend=-1))
    torn = np.flatnonzero(code != code[first][subject])
    if len(torn):
        raise InputError(
            f"Visits of {table['subject'].iat[torn[0]]} stand in different splits; "
            f"give all visits of a subject the same split, or views of one brain reach both training and test."
        )
    return code[first].astype(np.int8)


def evenly(pairs: np.ndarray, subject: np.ndarray) -> np.ndarray:
    """Equally many pairs of every subject, so that a mean over pairs weighs subjects equally.

    The number is that of the median subject. A subject with more pairs gives evenly spread ones; a subject with fewer
    repeats its own. Of series, of which a subject may have thousands, it is at most the median subject's visits.

    Args:
        pairs: ``(pairs, 2)`` rows, sorted by subject; of series ``(series, K)``.
        subject: ``(visits,)`` number of each row's subject.
    """
    if not len(pairs):
        return pairs
    own, start, number = np.unique(subject[pairs[:, 0]], return_index=True, return_counts=True)
    most = max(1, int(np.median(number)))
    if pairs.shape[1] > 2:
        most = min(most, int(np.median(np.bincount(subject)[own])))
    step = np.arange(most)
    spread = step * number[:, None] // most
    return pairs[(start[:, None] + np.where(number[:, None] >= most, spread, step % number[:, None])).ravel()]


def subject_splits(
    table: pd.DataFrame, names: Sequence[str], index: PairIndex, fractions: Sequence[float], seed: int
) -> np.ndarray:
    """Split of each subject: the table's column ``split`` if it has one, else a drawn one.

    Args:
        table: sorted by :func:`order_visits`.
        names: subjects, in the order of the table.
        index: of the table.
        fractions: shares of train, val and test; see :func:`split_subjects`.
        seed: of the draw.

    Returns:
        ``(subjects,)`` 0, 1 or 2 for train, val and test.
    """
    if "split" in table:
        return given_split(table, index.subject)
    visits = np.bincount(index.subject)
    paired = np.bincount(index.subject[index.pairs[:, 0]], minlength=len(visits)) > 0
    group = np.where(paired, 0, np.where(visits == 1, 1, 2))
    return split_subjects(names, group, fractions, seed)


def summarise(
    table: pd.DataFrame, index: PairIndex, singles: np.ndarray, excluded: Sequence[str], notes: Sequence[str]
) -> str:
    """One sentence: subjects, visits, pairs by split, what was excluded, and what else is to be known.

    Args:
        table: sorted, with the split of each visit.
        index: of the table.
        singles: rows of the single visits that are used.
        excluded: phrases with counts.
        notes: further phrases.
    """

    def by_split(rows: np.ndarray) -> str:
        number = table["split"].iloc[rows].value_counts()
        return ", ".join(f"{name} {number[name]}" for name in SPLITS)

    paired = len(np.unique(index.subject[index.pairs[:, 0]]))
    parts = [
        f"{count(table['subject'].nunique(), 'subject')}, {count(len(table), 'visit')}: "
        f"{len(index.pairs)} {item_name(*index.pairs.shape[::-1])} from {count(paired, 'subject')} "
        f"({by_split(index.pairs[:, 0])})"
    ]
    if len(singles):
        words = "used as same-visit pairs" if len(singles) > 1 else "used as a same-visit pair"
        parts.append(f"{count(len(singles), 'single visit')} {words} ({by_split(singles)})")
    parts.append("excluded: " + (", ".join(excluded) or "nothing"))
    return "; ".join([*parts, *notes]) + "."
