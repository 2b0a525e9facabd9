"""LabelMapDataModule: a longitudinal cohort made from real label maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lssl.data.batch import Visit
from lssl.data.pairs import SPLITS, count, split_subjects
from lssl.synthetic.base import SyntheticDataModule, share_of_subjects, spread_evenly
from lssl.synthetic.draws import uniform
from lssl.synthetic.label_map_anatomy import class_names, find_maps, read_map
from lssl.synthetic.label_map_image import CONTRASTS, scan
from lssl.synthetic.label_map_subject import (
    LONGEST,
    LONGEST_FAST,
    MapSubject,
    canonical,
    draw_subject,
    locate,
    structure_rates,
    volumes,
)
from lssl.synthetic.phantom_image import residual
from lssl.synthetic.phantom_subject import generator
from lssl.utils.errors import InputError

__all__ = ["LabelMapDataModule"]

_MIDDLE = (
    0.0,
    0.0,
    -9.0,
)  # mm from the middle of the cerebrum to the middle of the grid, which also holds the cerebellum


class LabelMapDataModule(SyntheticDataModule):
    """Subjects with the anatomy of real label maps (FreeSurfer's numbers) that age by known deformations.

    The first subject of each map has its unchanged anatomy. With more ``subjects`` than maps, further subjects have an
    anatomy deformed by a random affine map and a smooth warp. Between a subject's visits a smooth known deformation
    changes every structure at a known yearly rate (:meth:`rates`): lateral ventricles grow, the others shrink.
    Contrast, bias field, noise and a rigid misregistration of at most half a voxel and half a degree differ by visit.
    Images are T1-weighted in their order of fluid, grey and white matter; further ``contrasts`` are channels of the
    same head, each with brightness, texture, bias field and noise of its own. A visit is bit-identical for the same
    maps, seed, subject and visit.

    Subjects of one map share a split: the share in ``split`` is one of maps. ``classes`` names the labels 0, 1, … in
    order; the foreground is the head; the spinal cord belongs to no class.

    Args:
        root: folder of label maps (NIfTI).
        subjects: number of subjects, drawn from the maps in turn; ``None`` makes one of each map.
        visits: visits of each subject.
        lateral: separates left from right structures; otherwise both are one class.
        size: voxels along each axis, or along all three, around the brain.
        spacing: mm between voxels; the spacing of the maps or less keeps their detail.
        interval: mean years between visits; single intervals vary by up to a quarter of it.
        fast: share of subjects that change as in Alzheimer's disease, ventricles by 8 to 10 % and hippocampi by -4 to
            -5 % a year. With such subjects a course lasts 4 years at most, without them 6.
        contrasts: channels of a visit, of ``T1``, ``T2`` and ``FLAIR``.
        missing: share of the visits that lack one of the contrasts, drawn at random; that channel is 0.
        cache: keeps visits in memory once they are made, about 5 MB each at 80×104×88.
        seed: of the population, the split, the order and the boxes.
        **options: see :class:`.base.PairDataModule`.
    """

    KIND = "subject"
    knows_correspondence = True

    def __init__(
        self,
        root: str | Path,
        subjects: int | None = None,
        visits: int = 3,
        lateral: bool = False,
        size: int | tuple[int, int, int] = (80, 104, 88),
        spacing: float = 2.0,
        interval: float = 2.0,
        fast: float = 0.0,
        contrasts: Sequence[str] = ("T1",),
        missing: float = 0.0,
        cache: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.fast = share_of_subjects(fast=fast)
        self.LONGEST = LONGEST_FAST if fast else LONGEST
        super().__init__(visits, size, spacing, interval, cache, seed, **options)
        self.maps = find_maps(root)
        self.count = len(self.maps) if subjects is None else subjects
        if self.count < 1 or visits < 1:
            raise InputError(f"There are {subjects} subjects with {visits} visits; give at least one of each.")
        self.contrasts, self.missing = tuple(contrasts), missing
        self._check_contrasts()
        self.refuse_many(self.count, len(self.contrasts))
        self.maps, self.lateral, self.classes = self.maps[: self.count], lateral, class_names(lateral)
        self.label_names = dict(enumerate(self.classes))
        wanted = [name for name, share in zip(SPLITS, self.split, strict=True) if share > 0]
        if len(self.maps) < len(wanted):
            raise InputError(
                f"{count(len(self.maps), 'label map')} cannot be divided over {', '.join(wanted)}: all subjects of a "
                f"map share one split; use more maps, or set split to fewer parts."
            )

    def _check_contrasts(self) -> None:
        known = ", ".join(CONTRASTS)
        if not self.contrasts or len({*self.contrasts} & {*CONTRASTS}) < len(self.contrasts):
            raise InputError(f"contrasts is {list(self.contrasts)}; name at least one of {known}, and every one once.")
        if not 0 <= self.missing <= 1 or (self.missing and len(self.contrasts) < 2):
            raise InputError(
                f"missing is {self.missing:g}, a share of the visits that lack one of several contrasts; give a share "
                f"between 0 and 1, and at least two contrasts."
            )

    def visit_table(self) -> pd.DataFrame:
        """One row per visit; ``index`` and ``visit`` number subjects and their visits, ``map`` names the anatomy."""
        names = [path.name.split(".")[0].removesuffix("_dseg") for path in self.maps]
        for path in self.maps:  # a bad map is found before training
            read_map(path)
        parts = split_subjects(names, np.zeros(len(names), int), self.split, self.seed)
        rows = []
        for index in range(self.count):
            copy, number = divmod(index, len(self.maps))
            for visit in range(self.visits):
                time = self.time(index, visit)
                rows.append(
                    (
                        f"{names[number]}-{copy:03d}",
                        f"visit-{visit:02d}",
                        self.subject(index).age + time,
                        time,
                        SPLITS[parts[number]],
                        names[number],
                        index,
                        visit,
                    )
                )
        self.notes.append(f"anatomies from {count(len(names), 'label map')}")
        return pd.DataFrame(rows, columns=["subject", "session", "age", "time", "split", "map", "index", "visit"])

    def make(self, index: int, visit: int, age: float) -> Visit:
        """Image, classes and head of a visit."""
        affine = torch.eye(4, dtype=torch.float64) * self.spacing
        affine[:3, 3] = torch.tensor(_MIDDLE) - self.spacing * (torch.tensor(self.size) - 1) / 2
        affine[3, 3] = 1
        rigid = residual(self.seed, index, visit, self.spacing)
        key = (self.seed, index, visit)
        time, names = self.time(index, visit), self.contrasts
        made = scan(self.subject(index), key, time, affine, rigid, self.size, self.lateral, names)
        made.age, present = age, self._present(index, visit)
        if not present.all():
            made.present, made.image = present, made.image * present[:, None, None, None]
        return made

    def _present(self, index: int, visit: int) -> Tensor:
        """``(C,)`` bool, the contrasts that a visit has."""
        stream = generator("label map missing", self.seed, index, visit)
        present = torch.ones(len(self.contrasts), dtype=torch.bool)
        if uniform(stream, 0, 1) < self.missing:
            present[int(torch.randint(len(present), (1,), generator=stream))] = False
        return present

    def present(self) -> np.ndarray | None:
        """``(visits, C)`` bool."""
        if not self.missing:
            return None
        return np.stack([self._present(*self._visit_number(row)).numpy() for row in range(len(self.table))])

    def channels(self) -> list[str]:
        """The contrasts."""
        return list(self.contrasts)

    def subject(self, index: int) -> MapSubject:
        """Anatomy, shape and rates of a subject."""
        path = self.maps[index % len(self.maps)]
        return draw_subject(path, self.seed, index, index >= len(self.maps), spread_evenly(self.fast, index))

    def correspond(self, points: Tensor, first: int, second: int) -> Tensor:
        """Exact positions, in a second visit of the same map, of points of a first visit.

        Misregistration, ageing and shape are inverted and applied exactly. Between different maps, correspondence is
        unknown: NaN.

        Args:
            points: ``(N, 3)`` mm in the recorded frame of the first visit.
            first: row of its visit in the table, as ``PairBatch.session`` gives it.
            second: row of the other visit.

        Returns:
            ``(N, 3)`` mm in the recorded frame of the second visit, float64.
        """
        (index, visit), (index2, visit2) = self._visit_number(first), self._visit_number(second)
        one, other = self.subject(index), self.subject(index2)
        if one.anatomy is not other.anatomy:
            return torch.full(points.shape, float("nan"), dtype=torch.float64)
        rigid = residual(self.seed, index, visit, self.spacing)
        common = canonical(one, points.double() @ rigid[:3, :3].T + rigid[:3, 3], self.time(index, visit))
        there = locate(other, common, self.time(index2, visit2))
        rigid = residual(self.seed, index2, visit2, self.spacing)
        return (there - rigid[:3, 3]) @ rigid[:3, :3]

    def volumes(self, index: int, visit: int) -> dict[int, float]:
        """True volume of each class in mm³, free of voxel effects; see :func:`label_map_subject.volumes`."""
        return volumes(self.subject(index), self.time(index, visit), self.lateral)

    def rates(self, index: int) -> dict[str, float]:
        """Change of the logarithm of the volume of each structure per year, at the first visit."""
        return structure_rates(self.subject(index))
