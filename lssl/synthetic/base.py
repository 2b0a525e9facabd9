"""SyntheticDataModule: what cohorts that are made, not read, have in common."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lssl.data.batch import Visit
from lssl.data.datamodule import PairDataModule
from lssl.synthetic.phantom_image import visit_time
from lssl.utils.errors import InputError
from lssl.utils.memory import refuse_larger_than_memory

__all__ = ["SyntheticDataModule", "refuse_large_visits", "refuse_long_table", "share_of_subjects", "spread_evenly"]

MADE = 24  # bytes of each voxel while a visit is made: its index and its place, three float32 each
KEPT = 7  # and of a visit that is kept: image (float32), label (int16) and foreground
CHANNEL = 4  # and of each further channel
ROW = 200  # bytes of a visit in the table; pandas measures 166 and more


def share_of_subjects(**options: float) -> float:
    """The value of one option, refused unless it is between 0 and 1."""
    ((name, share),) = options.items()
    if not 0 <= share <= 1:
        raise InputError(f"{name} is {share:g}; give a share of the subjects between 0 and 1.")
    return share


def spread_evenly(share: float, index: int) -> bool:
    """Whether the subject ``index`` is one of a share that is spread evenly: more subjects do not change the first."""
    return math.floor((index + 1) * share + 1e-9) > math.floor(index * share + 1e-9)


def refuse_large_visits(size: Sequence[int]) -> None:
    """Refuses visits of so many voxels along ``(D, H, W)`` that one cannot be made in the free memory."""
    sides = "×".join(map(str, size))
    refuse_larger_than_memory(
        MADE * math.prod(size), f"data.init_args.size: making a visit of {sides} voxels", "choose a smaller size"
    )


def refuse_long_table(visits: int, options: str) -> None:
    """Refuses more visits than a table can hold; ``options`` are those to lower."""
    refuse_larger_than_memory(ROW * visits, f"A table of {visits:,} visits", f"choose smaller data.init_args.{options}")


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
        refuse_large_visits(self.size)
        self.cache: dict[int, Visit] | None = {} if cache else None

    def refuse_many(self, subjects: int, channels: int = 1) -> None:
        """Refuses more subjects than memory holds, in the table or in the cache."""
        visits = subjects * self.visits
        refuse_long_table(visits, "subjects or visits")
        if self.cache is not None:
            sides = "×".join(map(str, self.size))
            refuse_larger_than_memory(
                (KEPT + CHANNEL * (channels - 1)) * math.prod(self.size) * visits,
                f"Keeping {visits:,} visits of {sides} voxels",
                "set data.init_args.cache to false, which makes them anew in every epoch, or choose fewer subjects",
            )

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
