"""Visits that lack some of several channels."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from lssl.data.pairs import count
from lssl.utils.errors import InputError

__all__ = ["channel_files", "channel_notes", "keeps_partial", "name_visits", "prepared_channels", "with_reference"]

NAMED = 5  # visits that a note names


def keeps_partial(missing_channels: str) -> bool:
    """Whether visits that lack some of the channels are kept; refuses what is neither drop nor keep."""
    if missing_channels not in ("drop", "keep"):
        raise InputError(f"missing_channels is {missing_channels!r}; choose drop or keep.")
    return missing_channels == "keep"


def with_reference(table: pd.DataFrame) -> pd.DataFrame:
    """A table in which visits may lack channels, but have one.

    Args:
        table: the images of the channels in ``image``, ``image_1``, …, empty where a visit lacks one.

    Returns:
        The table with the first image that each visit has in ``image``, and the number of its channel in ``reference``.
    """
    files = table[["image", *(name for name in table if re.fullmatch(r"image_\d+", str(name)))]].to_numpy(object)
    reference = (files != "").argmax(1)
    return table.assign(image=files[np.arange(len(files)), reference], reference=reference)


def channel_files(table: pd.DataFrame, channels: int) -> np.ndarray:
    """``(visits, C)`` paths, empty where a visit lacks a channel; see :func:`with_reference`."""
    files = table[["image", *(f"image_{number}" for number in range(1, channels))]].to_numpy(object)
    if "reference" in table:
        files[table["reference"].to_numpy() != 0, 0] = ""
    return files


def channel_notes(
    table: pd.DataFrame, present: np.ndarray, channels: Sequence[str], training: bool = False
) -> list[str]:
    """Phrases that name the visits without a channel.

    Args:
        table: the visits.
        present: ``(visits, C)`` bool, which channels they have.
        channels: their names.
        training: refuses a channel that no visit has.
    """
    if training and not present.any(0).all():
        raise InputError(
            f"No visit has the channel {channels[int(present.any(0).argmin())]}; name other channels, or leave it out."
        )
    lacking = {name: table[~has] for name, has in zip(channels, present.T, strict=True)}
    return [
        f"{count(len(rows), 'visit')} without {name} ({name_visits(rows)}), where that channel is 0"
        for name, rows in lacking.items()
        if len(rows)
    ]


def name_visits(rows: pd.DataFrame) -> str:
    """The first visits of some rows of a table."""
    names = [f"{subject} {session}".strip() for subject, session in rows[["subject", "session"]].to_numpy().tolist()]
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def prepared_channels(
    table: pd.DataFrame, order: Sequence[str], partial: bool = False
) -> tuple[list[str], np.ndarray | None]:
    """Channels of prepared visits, and which of them each visit has.

    Args:
        table: perhaps with the column ``channels``, such as ``T1w+FLAIR``.
        order: of the channels.
        partial: also gives channels of ``order`` that no visit has.

    Returns:
        The channels in order; and ``(visits, C)`` bool, or ``None`` if all visits have all.
    """
    kinds = table["channels"].dropna().unique().tolist() if "channels" in table else []
    if not kinds or (len(kinds) == 1 and not partial):
        return (str(kinds[0]).split("+") if kinds else ["image"]), None
    own = [str(text).split("+") for text in table["channels"].fillna(kinds[0])]
    named = list(dict.fromkeys(name for names in own for name in names))
    channels = [*(name for name in order if partial or name in named), *(name for name in named if name not in order)]
    present = np.array([[name in names for name in channels] for names in own])
    return channels, None if present.all() else present
