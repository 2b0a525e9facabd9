"""Times from session labels: words that imply an order, numbers with a unit, and plain numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lssl.data.sidecars import DAYS_PER_YEAR, YEARS, parse_date

__all__ = ["WORDS", "LabelTime", "label_keys", "label_time", "label_years", "visit_ranks"]

#: Words of session labels in the order of a study; words of one line mean the same.
ORDER: tuple[str, ...] = (
    "screening screen sc scr prescreening prescreen",
    "pre preop presurgery presurgical pretreatment pretherapy pretest preintervention before prior",
    "baseline bl bsl base initial init enrolment enrollment entry inclusion intake start first test acute",
    "during intra intraop mid middle interim subacute",
    "retest rescan repeat second",
    "post postop postsurgery postsurgical posttreatment posttherapy posttest postintervention after chronic",
    "followup follow fu fup third",
    "last final end exit fourth",
)
WORDS = {word: rank for rank, words in enumerate(ORDER) for word in words.split()}
FILLERS = ("up", "visit", "arm", "session", "scan", "mri", "y", "op")
PARTS = sorted({*(word for word in (*WORDS, *YEARS) if len(word) > 3), "pre", "fu", *FILLERS}, key=len, reverse=True)
PART = re.compile("|".join(PARTS))
RUN_TOGETHER = re.compile(f"(?:{PART.pattern})+")
BASELINE = WORDS["baseline"]
SCREENING = WORDS["screening"]
LAST = WORDS["last"]


@dataclass(frozen=True)
class LabelTime:
    """The time information of one label.

    Attributes:
        rank: position of its word in :data:`ORDER`; NaN without such a word.
        years: since the baseline, from a number with a unit; NaN without one.
        date: days of the calendar, from a label such as ``20150302``; NaN without one.
        number: the number without a unit, if there is exactly one; NaN otherwise.
        skeleton: the label with its numbers taken out.
        letter: the single letter that ``years`` rests on (``w1`` may be a week or a wave); empty if written out.
    """

    rank: float = np.nan
    years: float = np.nan
    date: float = np.nan
    number: float = np.nan
    skeleton: str = ""
    letter: str = ""


@lru_cache(maxsize=65536)
def label_time(session: str) -> LabelTime:
    """Reads a session label, with ``ses-`` or without.

    ``ses-d0129`` (OASIS-3) is 129 days, ``M024`` (ADNI) two years, ``2YearFollowUpYArm1`` two years. A word for the
    baseline overrides a number (``baselineYear1Arm1``). A number without a unit (``01``) is not a time.
    """
    label = session.strip().removeprefix("ses-")
    numbers = re.findall(r"\d+", label)
    skeleton = re.sub(r"\d+", "#", label.lower())
    number = float(numbers[0]) if len(numbers) == 1 else np.nan
    if re.fullmatch(r"(19|20)\d{6}", label) and (date := parse_date(label)) is not None:
        return LabelTime(date=date, number=number, skeleton=skeleton)
    tokens = _tokens(label)
    rank = next((float(WORDS[token]) for token in tokens if token in WORDS), np.nan)
    years, letter = _years(tokens)
    if rank <= BASELINE:  # "baselineYear1Arm1" is the baseline, whatever Year1 means
        number = -years if rank < BASELINE and years == years else number  # "pre6months" is before "pre3months"
        years, letter = np.nan, ""
    return LabelTime(rank, years, np.nan, number, skeleton, letter)


def _tokens(label: str) -> list[str]:
    """Lower-case words and numbers; ``2YearFollowUp`` and ``2yearfollowup`` are split alike."""
    tokens: list[str] = []
    for token in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+(?:p\d+)?", label):
        word = token.lower()
        known = word in WORDS or word in YEARS or word[0].isdigit() or not RUN_TOGETHER.fullmatch(word)
        tokens += [word] if known else PART.findall(word)
    return tokens


def _years(tokens: list[str]) -> tuple[float, str]:
    """Sum of all numbers with units, ``y1m6`` or ``2Year``; a single letter counts only next to its number."""
    total, letter, used = 0.0, "", set[int]()
    number_first = bool(tokens) and tokens[0][0].isdigit()
    for place, token in enumerate(tokens):
        if token not in YEARS:
            continue
        sides = (place - 1, place + 1) if number_first or len(token) > 1 else (place + 1, place - 1)
        beside = [at for at in sides if 0 <= at < len(tokens) and tokens[at][0].isdigit() and at not in used]
        if beside:
            used.add(beside[0])
            total += float(tokens[beside[0]].replace("p", ".")) * YEARS[token]
            letter = token if len(token) == 1 else letter
    return (total, letter) if used else (np.nan, "")


def label_years(labels: Sequence[str], refused: frozenset[str] = frozenset()) -> list[float]:
    """Years since the baseline of one subject's visits, from their labels alone; NaN if a label gives no time.

    If other visits have numbers with units, the baseline (or else the screening) is year 0.

    Args:
        labels: of one subject.
        refused: single letters that do not mean units in this cohort.
    """
    found = [label_time(label) for label in labels]
    if all(item.date == item.date for item in found):
        return [(item.date - min(other.date for other in found)) / DAYS_PER_YEAR for item in found]
    years = [np.nan if item.letter in refused and item.letter else item.years for item in found]
    if all(value != value for value in years):
        return years
    zero = BASELINE if any(item.rank == BASELINE for item in found) else SCREENING
    if 0.0 in years:
        return years
    return [0.0 if item.rank == zero else value for item, value in zip(found, years, strict=True)]


def label_keys(labels: Sequence[str], refused: frozenset[str] = frozenset()) -> tuple[list[tuple[float, float]], str]:
    """Sort keys of one subject's visits, and how they were found: ``words``, ``numbers`` or an empty text.

    ``words``: every label has a word of the table, or a number with a unit; the words before and of the baseline come
    first, then numbers by size. Numbers with units cannot be ordered against words of a later time (``m06``, ``post``).
    ``numbers``: the labels differ in one plain number, ``01``, ``02`` or ``wave1``, ``wave2``.

    Args:
        labels: of one subject, all different.
        refused: single letters that do not mean units in this cohort.
    """
    found = [label_time(label) for label in labels]
    years = label_years(labels, refused)
    timed = [value == value for value in years]
    ranks = [item.rank for item in found]
    clear = all(
        known or rank <= BASELINE or rank == LAST or (rank == rank and not any(timed))
        for known, rank in zip(timed, ranks, strict=True)
    )
    if clear:
        keys = [_key(rank, value, item.number) for rank, value, item in zip(ranks, years, found, strict=True)]
        if len(set(keys)) == len(keys):
            return keys, "words"
    numbers = [(0.0, item.number) for item in found]
    if len({item.skeleton for item in found}) == 1 and all(item.number == item.number for item in found):
        return (numbers, "numbers") if len(set(numbers)) == len(numbers) else ([], "")
    return [], ""


def _key(rank: float, years: float, number: float) -> tuple[float, float]:
    """Words up to the baseline, then years, then later words; a number orders labels with the same word."""
    if years == years and not rank < BASELINE:
        return (BASELINE, years) if years == 0 else (BASELINE + 0.5, years)
    return rank, 0.0 if number != number else number


def visit_ranks(
    subject: np.ndarray, session: Sequence[str], time: np.ndarray, refused: frozenset[str] = frozenset()
) -> tuple[np.ndarray, np.ndarray]:
    """The rank of each visit among the visits of its subject, and how it is known.

    Args:
        subject: ``(V,)`` numbers of subjects.
        session: V labels.
        time: ``(V,)`` years, NaN where unknown.
        refused: single letters that do not mean units in this cohort.

    Returns:
        ``(V,)`` ranks, NaN where the order is unknown; and ``(V,)`` of ``time``, ``words``, ``numbers`` or, for an
        unknown order, the empty string, equal for all visits of a subject.
    """
    rank, known = time.astype(float).copy(), np.full(len(time), "time", dtype=object)
    visits = np.bincount(subject)
    untimed = np.bincount(subject, weights=np.isnan(time)) > 0
    rank[untimed[subject]] = np.nan
    rank[visits[subject] == 1] = 0.0
    several = np.flatnonzero(untimed[subject] & (visits[subject] > 1))
    rows = several[np.argsort(subject[several], kind="stable")]
    ends = np.flatnonzero(np.diff(subject[rows])) + 1
    found: dict[tuple[str, ...], tuple[list[tuple[float, float]], str]] = {}
    for group in np.split(rows, ends) if len(rows) else []:
        labels = tuple(session[row] for row in group)
        if labels not in found:
            found[labels] = label_keys(labels, refused)
        keys, how = found[labels]
        order = sorted(range(len(group)), key=keys.__getitem__) if how else []
        timed = [time[group[place]] for place in order if time[group[place]] == time[group[place]]]
        if timed != sorted(timed):
            how = ""
        known[group] = how
        if how:
            rank[group[order]] = np.arange(len(group))
    return rank, known
