"""The working spacing: the one voxel size of all views of a run.

A cohort may mix voxel sizes. A network sees all of it at one *working spacing* ``w``, by default the median over the
training visits' headers, axis by axis. A view of ``n`` voxels then covers ``n w`` mm of every visit. A visit of voxel
size ``s`` is resampled by ``w / s`` of its own voxels per view voxel; within 1 % of it, this factor is exactly 1, so
that a cohort of one voxel size is not resampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from lssl.data.batch import Visit
from lssl.data.pairs import count, visit_name
from lssl.utils.errors import InputError

__all__ = [
    "TOLERANCE",
    "BoxReader",
    "median_spacing",
    "refuse_large_views",
    "spacing_sentence",
    "spacing_text",
    "voxels_per_step",
]

TOLERANCE = 0.01

Reader = Callable[[Sequence[int], "tuple[int, int, int] | None", "int | None"], tuple[Visit, ...]]


def median_spacing(sizes: np.ndarray, train: np.ndarray) -> np.ndarray:
    """``(3,)`` mm: the median of the training visits; of all visits where none is for training.

    Args:
        sizes: ``(visits, 3)`` mm.
        train: ``(visits,)`` bool.
    """
    return np.median(sizes[train] if train.any() else sizes, axis=0)


def voxels_per_step(sizes: np.ndarray, spacing: Sequence[float] | np.ndarray) -> np.ndarray:
    """``(visits, 3)``: voxels of a visit in a step of the working spacing; exactly 1 within :data:`TOLERANCE`.

    Args:
        sizes: ``(visits, 3)`` mm.
        spacing: ``(3,)`` mm.
    """
    steps = np.asarray(spacing, dtype=float) / sizes
    return np.where(np.abs(steps - 1) < TOLERANCE, 1.0, steps)


def spacing_sentence(sizes: np.ndarray, spacing: Sequence[float] | np.ndarray, source: str) -> str:
    """Which visits are resampled, in a sentence; nothing if none is.

    Args:
        sizes: ``(visits, 3)`` mm.
        spacing: the working spacing.
        source: where it comes from, such as ``the median of the training visits``.
    """
    if (voxels_per_step(sizes, spacing) == 1).all():
        return ""
    kinds, counts = np.unique(np.round(sizes, 2), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    listed = [f"{counts[row]} of {spacing_text(kinds[row])} mm" for row in order[:4]]
    more = f", and {int(counts[order[4:]].sum())} of {len(order) - 4} other sizes" if len(order) > 4 else ""
    other = "" if source == "views.spacing" else "; views.spacing sets another"
    return (
        f"Voxel sizes of {count(len(sizes), 'visit')}: {', '.join(listed)}{more}; all views have the working spacing "
        f"{spacing_text(spacing)} mm ({source}{other})."
    )


def refuse_large_views(
    size: Sequence[int],
    shapes: np.ndarray,
    steps: np.ndarray | None,
    source_size: tuple[int, int, int] | None,
    table: pd.DataFrame,
) -> None:
    """Refuses views that do not fit into the source of every visit.

    Args:
        size: voxels of a view.
        shapes: ``(visits, 3)`` voxels of the visits.
        steps: of :func:`voxels_per_step`; ``None`` stands for views in each visit's own voxels.
        source_size: voxels of the boxes that are read, as many as views would have; ``None`` for whole visits.
        table: names the visits.
    """
    needed = np.array(size) * (1.0 if steps is None else steps)
    small = np.flatnonzero((shapes < needed - 1e-6).any(1))
    wanted = "×".join(str(length) for length in size)
    if len(small):
        row = int(small[np.argmin(shapes[small].prod(1))])
        own = (
            "" if steps is None or (steps[row] == 1).all() else f", {'×'.join(f'{n:.3g}' for n in needed[row])} of its,"
        )
        fits = int((shapes / (1.0 if steps is None else steps)).min() + 1e-6) // 16 * 16
        choice = f"smaller views (--views.size {fits} fits all)" if fits >= 32 else "smaller views"
        raise InputError(
            f"Views of {wanted} voxels{own} do not fit into {count(len(small), 'visit')}, the smallest being "
            f"{visit_name(table, row)} with {'×'.join(map(str, shapes[row]))}; "
            f"choose {choice} or leave these visits out."
        )
    if source_size is not None and (np.array(source_size) < np.array(size)).any():
        box = "×".join(map(str, source_size))
        raise InputError(f"Views of {wanted} voxels do not fit into source_size {box}; raise source_size.")


def spacing_text(sides: Sequence[float] | np.ndarray) -> str:
    """``1×1×1.2``."""
    return "×".join(f"{float(side):.3g}" for side in sides)


class BoxReader:
    """Reads boxes that have the same extent in mm in every visit.

    Args:
        read: reads the same box of several visits, see :meth:`PairDataModule.read_visits`.
        steps: of :func:`voxels_per_step`; ``None`` reads boxes of each visit's own voxels.
    """

    def __init__(self, read: Reader, steps: np.ndarray | None) -> None:
        self.read, self.steps = read, steps

    def __call__(self, rows: Sequence[int], size: tuple[int, int, int] | None, seed: int | None) -> tuple[Visit, ...]:
        """``size`` is in voxels of the working spacing; the box has as many of the visit's as cover it."""
        if size is not None and self.steps is not None:
            steps = self.steps[list(rows)].max(0)
            d, h, w = np.ceil(np.array(size) * steps - 1e-6).astype(int).tolist()
            size = d, h, w
        return self.read(rows, size, seed)
