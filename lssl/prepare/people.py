"""Whether the visits of a subject show one person."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lssl.prepare.quality import LOWEST_SAME_PERSON
from lssl.prepare.register import mirror_information
from lssl.prepare.volumes import Volume

__all__ = ["by_visit", "information_gain", "same_person"]

LEAST = 0.2  # nats of mutual information; differences of what is less are chance


def same_person(first: Volume, second: Volume, matrix: np.ndarray) -> float:
    """How much better the second image fits the first as it is than mirrored, in [−1, 1]; see :func:`information_gain`.

    Args:
        first: an image.
        second: another one, said to be of the same head.
        matrix: point of the first → point of the second, as found by registration.
    """
    return information_gain(*mirror_information(first, second, matrix))


def information_gain(straight: float, mirrored: float) -> float:
    """``(I − M) / max(I, M, 0.2)``, for mutual informations in nats, I as it is and M mirrored; NaN stays NaN.

    Heads are nearly symmetric, and a person's own folds are not. The mirror image of a brain is as good as another
    person's: same shape, contrast and resolution, other folds. It is therefore the yardstick for each pair, whatever
    its contrasts, noise and slices: towards 1 for one person, near 0 for two or for noise, towards −1 if an image was
    flipped.
    """
    return (straight - mirrored) / max(straight, mirrored, LEAST)


def by_visit(number: int, figures: Mapping[tuple[int, int], float]) -> list[float]:
    """Of each visit, its best figure against the visits that show the person of most visits.

    Visits whose figure is at least the threshold show one person, and so do visits that are linked through others.
    A visit outside the largest such group has the best figure of its own group against any other visit, which lies
    below the threshold. Where two groups are equally large, it is not known which is right, and both are outside.

    Args:
        number: of visits.
        figures: of pairs of visits ``(i, j)``, :func:`same_person`.
    """
    group = list(range(number))
    for (i, j), figure in figures.items():
        if figure >= LOWEST_SAME_PERSON:
            group = [group[i] if other == group[j] else other for other in group]
    sizes = [group.count(own) for own in group]
    largest = {own for own, size in zip(group, sizes, strict=True) if size == max(sizes)}
    found = []
    for visit, own in enumerate(group):
        within = largest == {own}
        pairs = [
            value
            for (i, j), value in figures.items()
            if (visit in (i, j) and group[i] == group[j] if within else (group[i] == own) != (group[j] == own))
        ]
        found.append(max((value for value in pairs if not np.isnan(value)), default=float("nan")))
    return found
