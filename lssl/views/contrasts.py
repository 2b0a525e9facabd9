"""Which contrasts (channels) each view of a pair shows, of those that its visit has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from lssl.utils.errors import InputError

__all__ = ["Contrasts", "check_contrasts", "draw_shown"]

Contrasts = Literal["same", "cross", "mix"]


def check_contrasts(contrasts: str, channels: Sequence[str] | None = None) -> None:
    """Refuses a choice that does not exist, or that one channel leaves no room for."""
    if contrasts not in get_args(Contrasts):
        raise InputError(f"views: contrasts is same, cross or mix, not {contrasts!r}.")
    if contrasts != "same" and channels is not None and len(channels) < 2:
        raise InputError(
            f"views.contrasts is {contrasts}, and the images have 1 channel ({channels[0]}); give data of several "
            f"(data.init_args.suffix), or leave views.contrasts at same."
        )


def draw_shown(present: np.ndarray, contrasts: Contrasts, draws: np.random.Generator) -> np.ndarray:
    """Draws which channels each view shows; at least one, and none that its visit lacks.

    Args:
        present: ``(B, K, C)`` bool, the channels that the visits of a pair or series have, at least one each.
        contrasts: ``same`` shows all of them. ``cross`` divides them among the two views: a channel that only one visit
            has goes to its view, the others are cut in two at random, so that no channel is in both views; where both
            visits have one and the same channel alone, both show it. ``mix``: each view shows a number of its visit's
            channels, drawn uniformly from one to all of them.
        draws: source of random numbers.

    Returns:
        ``(B, K, C)`` bool.

    Raises:
        InputError: if ``cross`` is to divide the channels among more than two views.
    """
    if contrasts == "same":
        return present
    if contrasts == "mix":
        order, part = draws.random(present.shape), draws.random(present.shape[:2])
        number = 1 + np.floor(part * present.sum(-1))
        return present & (_rank(order, present) < number[..., None])
    if present.shape[1] > 2:
        raise InputError(
            f"views.contrasts is cross, which divides channels between two views, and there are {present.shape[1]}; "
            f"choose same or mix."
        )
    first, second = present[:, 0], present[:, 1]
    both = first & second
    order, part = draws.random(both.shape), draws.random(len(both))
    least = np.where((first & ~both).any(-1), 0, 1)
    most = both.sum(-1) - np.where((second & ~both).any(-1), 0, 1)
    cut = least + np.floor(part * (most - least + 1))
    early = _rank(order, both) < cut[:, None]
    divided = np.stack([first & ~(both & ~early), second & ~(both & early)], 1)
    return np.where((most >= least)[:, None, None], divided, present)


def _rank(order: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Place of each channel ``(..., C)`` in the order of draws, those of ``among`` first."""
    return np.where(among, order, 2.0).argsort(-1).argsort(-1)
