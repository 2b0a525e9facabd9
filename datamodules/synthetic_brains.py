"""SyntheticBrainsDataModule: an endless stream of pairs of visits, no two alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lssl.data.batch import Visit
from lssl.data.boxes import same_box
from lssl.data.datamodule import PairDataModule
from lssl.data.pairs import SPLITS, count, split_subjects
from lssl.synthetic.base import refuse_large_visits, refuse_long_table, share_of_subjects
from lssl.synthetic.label_map_anatomy import class_names, find_maps
from lssl.synthetic.stream import Stream
from lssl.synthetic.stream_anatomy import Anatomy, map_anatomy, phantom_anatomy, shapes_anatomy
from lssl.utils.errors import InputError

__all__ = ["SyntheticBrainsDataModule"]

_PHANTOMS = 12  # heads that stand in for label maps
_SAMPLED = 16  # training subjects whose labels tell classes and their shares
_INTERVAL = 1.75  # mean years between two visits; a pair's own times stand in its visits


class SyntheticBrainsDataModule(PairDataModule):
    """Synthetic visits of which every training pair is new: anatomy, change, contrast, and the faults of real scans.

    A training pair is made from the number that the sampler draws for its place in training, so workers never repeat
    one another, and a resumed run goes on with the same pairs, to the bit. Validation and test pairs are fixed, and
    their anatomies (maps) are not those of training.

    Anatomies are label maps with FreeSurfer's numbers (``root``), or procedural heads where there are none, bent,
    scaled (from infants to large adults) and mirrored; a share is random shapes, which have no labels. Between the two
    visits, half a year to three years apart, structures change by known smooth deformations and lesions of white matter
    come and go. Contrasts are like T1, T2 or FLAIR, or any; see `stream_contrast` and `stream_scanner` for the faults.

    Labels are those of :class:`.label_maps.LabelMapDataModule`; lesions belong to white matter. The frame of a pair is
    its subject's, with a misregistration of at most half a voxel and half a degree.

    Args:
        root: folder of label maps (NIfTI); ``None`` takes procedural heads, which need no data.
        pairs_per_epoch: training pairs of an epoch.
        held_out: fixed subjects of each of validation and test.
        size: voxels along each axis, or along all three; the box lies at random around the brain.
        spacing: mm between voxels.
        anywhere: share of heads with a skull of which any box is shown, neck and face too, instead of one around the
            brain. A network that is to segment whole scans must have seen them.
        change: factor on the change between the visits; 0 shows the same anatomy twice, with another scanner.
        same_contrast: share of pairs whose visits have the same contrast, but for what differs from day to day.
        shapes: share of pairs that show random shapes instead of a head.
        lesions: share of subjects with lesions of white matter.
        lateral: separates left from right structures; otherwise both are one class.
        split: shares of the maps.
        seed: of everything.
        **options: see :class:`.base.PairDataModule`.
    """

    knows_correspondence = True

    def __init__(
        self,
        root: str | Path | None = None,
        pairs_per_epoch: int = 1000,
        held_out: int = 8,
        size: int | tuple[int, int, int] = 80,
        spacing: float = 2.0,
        anywhere: float = 0.0,
        change: float = 1.0,
        same_contrast: float = 0.5,
        shapes: float = 0.1,
        lesions: float = 0.3,
        lateral: bool = False,
        split: tuple[float, float, float] = (0.7, 0.15, 0.15),
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(split=split, seed=seed, **options)
        if pairs_per_epoch < 1 or held_out < 1:
            raise InputError(
                f"pairs_per_epoch is {pairs_per_epoch} and held_out is {held_out}; give at least 1 of each."
            )
        if spacing <= 0 or change < 0:
            raise InputError(
                f"spacing is {spacing:g} mm and change is {change:g}; spacing must be positive, change ≥ 0."
            )
        chosen = (self.few_shot.subjects, self.few_shot.visits, self.max_interval)
        if any(value is not None for value in chosen) or self.min_interval > 0:
            raise InputError(
                "few_shot (subjects, visits), min_interval and max_interval choose among visits that are there, and a "
                "stream makes its own; leave them out, or take LabelMapDataModule."
            )
        if self.visits_per_item > 2:
            raise InputError(
                f"visits_per_item is {self.visits_per_item}, and a stream makes two visits of a subject; set it to 2, "
                f"or take LabelMapDataModule."
            )
        self.size: tuple[int, int, int] = (size, size, size) if isinstance(size, int) else (size[0], size[1], size[2])
        if min(self.size) < 8:
            raise InputError(f"size is {list(self.size)}; give at least 8 voxels along each axis.")
        refuse_large_visits(self.size)
        refuse_long_table(2 * (pairs_per_epoch + 2 * held_out), "pairs_per_epoch or held_out")
        self.maps = [] if root is None else find_maps(root)
        self.pairs_per_epoch, self.held_out, self.spacing, self.lateral = pairs_per_epoch, held_out, spacing, lateral
        self.label_names = dict(enumerate(class_names(lateral)))
        alike, spotted = share_of_subjects(same_contrast=same_contrast), share_of_subjects(lesions=lesions)
        anywhere = share_of_subjects(anywhere=anywhere)
        self.draws = {
            name: AnatomyDraw(self.maps, numbers, share_of_subjects(shapes=shapes), seed)
            for name, numbers in self._split_anatomies().items()
        }
        self.streams = {
            name: Stream(draw, self.size, spacing, change, alike, spotted, lateral, anywhere)
            for name, draw in self.draws.items()
        }

    def _split_anatomies(self) -> dict[str, list[int]]:
        """The numbers of each split's anatomies; a split whose share is 0 has none."""
        total = len(self.maps) or _PHANTOMS
        names = [f"{number:03d}" for number in range(total)]
        wanted = [name for name, share in zip(SPLITS, self.split, strict=True) if share > 0]
        if total < len(wanted):
            raise InputError(
                f"{count(total, 'label map')} cannot be divided over {', '.join(wanted)}: a map belongs to one split; "
                f"use more maps, or set split to fewer parts."
            )
        parts = split_subjects(names, np.zeros(total, int), self.split, self.seed)
        return {name: np.flatnonzero(parts == part).tolist() for part, name in enumerate(SPLITS) if name in wanted}

    def visit_table(self) -> pd.DataFrame:
        """Two rows of each subject. A training subject is a place in the epoch: its anatomy is new each time."""
        counts = {"train": self.pairs_per_epoch, "val": self.held_out, "test": self.held_out}
        rows = [
            (f"{split}-{number:06d}", f"visit-{visit}", np.nan, visit * _INTERVAL, split, number)
            for split in self.streams
            for number in range(counts[split])
            for visit in range(2)
        ]
        kind = count(len(self.maps), "label map") if self.maps else f"{_PHANTOMS} procedural heads"
        self.notes.append(f"anatomies from {kind}; every training pair is new")
        return pd.DataFrame(rows, columns=["subject", "session", "age", "time", "split", "index"])

    def read(self, row: int) -> Visit:
        """The fixed visit in a row of the table, as validation, test and prediction see it."""
        return self.read_visits((row,), None, None)[0]

    def read_visits(
        self, rows: Sequence[int], size: tuple[int, int, int] | None, seed: int | None
    ) -> tuple[Visit, ...]:
        """A new pair for every seed; without one, the fixed pair of the rows' subject. ``size`` must be the visits'."""
        stream, number = self._fixed_pair(rows[0])
        wanted = list(dict.fromkeys(self._visit(row) for row in rows))
        made = dict(zip(wanted, stream.visits(number if seed is None else seed, wanted), strict=True))
        visits = tuple(made[self._visit(row)] for row in rows)
        return visits if size is None or tuple(size) == self.size else same_box(visits, size, seed)

    def correspond(self, points: Tensor, first: int, second: int) -> Tensor:
        """Exact positions, in a fixed visit, of points of the same subject's other visit; NaN for another subject's."""
        (stream, number), (_, other) = self._fixed_pair(first), self._fixed_pair(second)
        if number != other:
            return torch.full(points.shape, float("nan"), dtype=torch.float64)
        return stream.correspond(number, points, self._visit(first), self._visit(second))

    def shapes(self) -> np.ndarray:
        """``(visits, 3)`` voxels."""
        return np.tile(self.size, (len(self.table), 1))

    def voxel_sizes(self) -> np.ndarray:
        """``(visits, 3)`` mm."""
        return np.full((len(self.table), 3), float(self.spacing))

    def has_label(self) -> np.ndarray:
        """``(visits,)`` true: random shapes have an empty label map."""
        return np.ones(len(self.table), dtype=bool)

    def read_label(self, row: int) -> np.ndarray | None:
        """Labels of a fixed visit; of training, whose visits are new each time, a sample stands for all others."""
        in_training = str(self.table["split"].iat[row]) == "train"
        if in_training and int(self.table["index"].to_numpy()[row]) >= _SAMPLED:
            return None
        return super().read_label(row)

    def channels(self) -> list[str]:
        """The one channel, of changing contrast."""
        return ["synthetic"]

    def _fixed_pair(self, row: int) -> tuple[Stream, int]:
        """The stream of a row's split, and the number of its subject's fixed pair."""
        split, index = str(self.table["split"].iat[row]), int(self.table["index"].to_numpy()[row])
        mixed = np.random.SeedSequence([self.seed, SPLITS.index(split), index]).generate_state(1, np.uint64)[0]
        return self.streams[split], int(mixed >> np.uint64(2))

    def _visit(self, row: int) -> int:
        return int(str(self.table["session"].iat[row])[-1])


@dataclass(frozen=True)
class AnatomyDraw:
    """Draws one of some label maps or procedural heads, or random shapes.

    Attributes:
        maps: files; without any, heads are procedural.
        numbers: which of them.
        shapes: share of random shapes.
        seed: of the procedural heads.
    """

    maps: list[Path]
    numbers: list[int]
    shapes: float
    seed: int

    def __call__(self, stream: torch.Generator) -> Anatomy:
        """An anatomy, drawn from ``stream``."""
        draw = torch.rand(2, generator=stream).tolist()
        if draw[0] < self.shapes:
            return shapes_anatomy(stream)
        number = self.numbers[int(draw[1] * len(self.numbers))]
        return map_anatomy(self.maps[number]) if self.maps else phantom_anatomy(self.seed, number)
