"""SyntheticDataModule: what cohorts that are made, not read, have in common."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from lssl.data.batch import Visit
from lssl.data.datamodule import PairDataModule
from lssl.synthetic.phantom_image import visit_time
from lssl.utils.errors import InputError

__all__ = ["SyntheticDataModule", "share_of_subjects", "spread_evenly"]


def share_of_subjects(**options: float) -> float:
    """The value of one option, refused unless it is between 0 and 1."""
    ((name, share),) = options.items()
    if not 0 <= share <= 1:
        raise InputError(f"{name} is {share:g}; give a share of the subjects between 0 and 1.")
    return share


def spread_evenly(share: float, index: int) -> bool:
    """Whether the subject ``index`` is one of a share that is spread evenly: more subjects do not change the first."""
    return math.floor((index + 1) * share + 1e-9) > math.floor(index * share + 1e-9)


class SyntheticDataModule(PairDataModule):
    """Visits made from (seed, subject, visit), on one cubic grid, kept in memory once they are made.

    A subclass has the columns ``index`` (the subject's number), ``visit`` and ``age`` in its visit table, and makes a
    visit in :meth:`make`.

    Args:
        visits: visits of each subject.
        size: voxels along each axis, or along all three.
        spacing: mm between voxels.
        interval: years between visits, which vary by up to a quarter of it.
        cache: keeps visits in memory.
        seed: of the population, the split, the order and the boxes.
        **options: see :class:`.base.PairDataModule`.
    """

    #: What a subject is called in messages, and the years for which it ages as it says.
    KIND = "synthetic"
    LONGEST = float("inf")

    def __init__(
        self,
        visits: int,
        size: int | tuple[int, int, int],
        spacing: float,
        interval: float,
        cache: bool,
        seed: int,
        **options: Any,
    ) -> None:
        super().__init__(seed=seed, **options)
        if spacing <= 0 or interval <= 0:
            raise InputError(f"spacing is {spacing:g} mm and interval is {interval:g} years; both must be positive.")
        if (visits - 0.75) * interval > self.LONGEST:
            raise InputError(
                f"{visits} visits every {interval:g} years are too many; {self.KIND}s age for {self.LONGEST:g} years "
                f"at most."
            )
        self.visits, self.spacing, self.interval = visits, spacing, interval
        self.size: tuple[int, int, int] = (size, size, size) if isinstance(size, int) else (size[0], size[1], size[2])
        if min(self.size) < 8:
            raise InputError(f"size is {list(self.size)}; a {self.KIND} needs at least 8 voxels along each axis.")
        self.cache: dict[int, Visit] | None = {} if cache else None

    def make(self, index: int, visit: int, age: float) -> Visit:
        """Makes the visit ``visit`` of subject ``index``."""
        raise NotImplementedError(f"{type(self).__name__} must say how a visit is made, in make(index, visit, age).")

    def time(self, index: int, visit: int) -> float:
        """Years between the first visit of subject ``index`` and its visit ``visit``."""
        return visit_time(self.seed, index, visit, self.interval)

    def read(self, row: int) -> Visit:
        """Makes the visit in a row of the table, or takes it from the cache."""
        if self.cache is None or row not in self.cache:
            made = self.make(*self._visit_number(row), float(self.table["age"].iloc[row]))
            if self.cache is None:
                return made
            self.cache[row] = made
        kept = self.cache[row]
        # A copy, as a transform may write into its visit.
        return dataclasses.replace(kept, image=kept.image.clone(), affine=kept.affine.clone())

    def voxel_sizes(self) -> np.ndarray:
        """``(visits, 3)`` mm, one spacing."""
        return np.full((len(self.table), 3), float(self.spacing))

    def _visit_number(self, row: int) -> tuple[int, int]:
        return int(self.table["index"].iloc[row]), int(self.table["visit"].iloc[row])
