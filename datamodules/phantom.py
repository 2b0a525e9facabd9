"""PhantomDataModule: procedural longitudinal head phantoms, which need no download."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
from torch import Tensor

from lssl.data.batch import Visit
from lssl.synthetic.base import SyntheticDataModule, share_of_subjects, spread_evenly
from lssl.synthetic.phantom_ageing import LONGEST, LONGEST_FAST, canonical, locate, structure_rates, volumes
from lssl.synthetic.phantom_anatomy import STRUCTURES
from lssl.synthetic.phantom_image import Scan, residual, scan, subject
from lssl.synthetic.phantom_lesions import CHANGES, Lesion, draw_lesions
from lssl.synthetic.phantom_subject import PhantomSubject, check_rates
from lssl.utils.errors import InputError

__all__ = ["PhantomDataModule"]


class PhantomDataModule(SyntheticDataModule):
    """Heads that age: T1-weighted images of a procedural brain, with labels, volumes and correspondences known.

    A subject has its own size, shape, folds, ventricles and brightness. Between its visits a smooth known deformation
    makes the ventricles grow and cortex and hippocampi shrink at the subject's own yearly rates; contrast, bias field,
    noise and a rigid misregistration of at most half a voxel and half a degree differ by visit. A visit is
    bit-identical for the same seed, subject and visit.

    Labels are FreeSurfer's (`phantom_anatomy.STRUCTURES`), the foreground is the head.

    Args:
        subjects: number of subjects.
        visits: visits of each subject.
        size: voxels along each axis, or along all three.
        spacing: mm between voxels. 64 voxels of 3 mm hold a whole head.
        interval: mean years between visits; single intervals vary by up to a quarter of it.
        single_visit_fraction: share of subjects with a single visit.
        fast: share of subjects that change as in Alzheimer's disease, ventricles by 8 to 10 % and hippocampi by -4 to
            -5 % a year. With such subjects a course lasts 6 years at most, without them 12.
        rate_groups: group → yearly rates of "ventricles", "hippocampus" and "cortex" (change of the logarithm of the
            volume), instead of ``fast``. Subjects are dealt to the groups in turn, and differ in nothing else: at the
            first visit, a group cannot be seen. The table of visits names it in the column ``group``. A course lasts
            6 years at most.
        lesions: white-matter lesions of each subject, see :mod:`lssl.synthetic.phantom_lesions`. Between visits they
            appear, grow, vanish or stay; those of every fourth subject stay.
        labels: ``anatomy``, or ``change``: what has happened to lesions since the previous visit: 1 new, 2 grown (what
            was added), 3 vanished, 4 stable. First visits then have no label.
        contrast: share of each tissue's brightness that every visit draws anew, as if each came from another sequence;
            0 keeps the order of T1-weighted images, 1 is a random one.
        cache: keeps visits in memory once they are made, about 2 MB each at 64³.
        seed: of the population, the split, the order and the boxes.
        **options: see :class:`.base.PairDataModule`.
    """

    KIND = "phantom"
    knows_correspondence = True
    common_frame = True  # the middle of every head is the origin

    def __init__(
        self,
        subjects: int = 24,
        visits: int = 3,
        size: int | tuple[int, int, int] = 64,
        spacing: float = 3.0,
        interval: float = 2.0,
        single_visit_fraction: float = 0.0,
        fast: float = 0.0,
        rate_groups: dict[str, dict[str, float]] | None = None,
        lesions: int = 0,
        labels: Literal["anatomy", "change"] = "anatomy",
        contrast: float = 0.0,
        cache: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.fast = share_of_subjects(fast=fast)
        self.rate_groups = {name: check_rates(name, rates) for name, rates in (rate_groups or {}).items()}
        if fast and rate_groups:
            raise InputError("fast and rate_groups both say how fast subjects age; give one of the two.")
        self.LONGEST = LONGEST_FAST if fast or rate_groups else LONGEST
        super().__init__(visits, size, spacing, interval, cache, seed, **options)
        if subjects < 1 or visits < 1:
            raise InputError(f"There are {subjects} phantom subjects with {visits} visits; give at least one of each.")
        self.refuse_many(subjects)
        self.count = subjects
        self.single_visit_fraction = share_of_subjects(single_visit_fraction=single_visit_fraction)
        if lesions < 0 or (labels == "change" and not lesions):
            raise InputError(f"There are {lesions} lesions, so there is no change; give at least one.")
        if not 0 <= contrast <= 1:
            raise InputError(f"contrast is {contrast:g}; give a share of the brightness between 0 and 1.")
        self.lesions, self.label_kind, self.contrast = lesions, labels, contrast
        self.label_names = STRUCTURES if labels == "anatomy" else CHANGES

    def visit_table(self) -> pd.DataFrame:
        """One row per visit; ``index`` and ``visit`` are the numbers that :meth:`scan` takes."""
        rows = []
        for index in range(self.count):
            baseline = self.subject(index).age
            for visit in range(1 if spread_evenly(self.single_visit_fraction, index) else self.visits):
                time = self.time(index, visit)
                rows.append((f"phantom-{index:04d}", f"visit-{visit:02d}", baseline + time, time, index, visit))
        table = pd.DataFrame(rows, columns=["subject", "session", "age", "time", "index", "visit"])
        return table.assign(group=table["index"].map(self.group)) if self.rate_groups else table

    def group(self, index: int) -> str:
        """Name of a subject's group of rates; empty without groups."""
        names = list(self.rate_groups)
        return names[index % len(names)] if names else ""

    def make(self, index: int, visit: int, age: float) -> Visit:
        """The visit as it goes into a batch."""
        made = self.scan(index, visit)
        change = made.change if visit else None
        label = made.label if self.label_kind == "anatomy" else change
        return Visit(made.image[None], made.affine, made.head, age=age, label=label)

    def has_label(self) -> np.ndarray:
        """``(visits,)`` bool: first visits have no change."""
        return (self.table["visit"] > 0).to_numpy() | (self.label_kind == "anatomy")

    def scan(self, index: int, visit: int) -> Scan:
        """Image, labels, head mask, affine and true misregistration of a visit."""
        fast, rates = spread_evenly(self.fast, index), self.rate_groups.get(self.group(index), ())
        lesions, time = self.lesions_of(index), self.time(index, visit)
        return scan(
            self.seed, index, visit, time, self.size, self.spacing, fast, rates, lesions, contrast=self.contrast
        )

    def lesions_of(self, index: int) -> tuple[Lesion, ...]:
        """The lesions of a subject."""
        if not self.lesions:
            return ()
        return draw_lesions(self.subject(index), self.seed, index, self.lesions, self.visits)

    def subject(self, index: int) -> PhantomSubject:
        """Shape, tissue and rates of a subject."""
        return subject(self.seed, index, spread_evenly(self.fast, index), self.rate_groups.get(self.group(index), ()))

    def correspond(self, points: Tensor, first: int, second: int) -> Tensor:
        """Exact positions, in a second visit, of points of a first visit; the subjects may differ.

        Misregistration, ageing and shape are inverted and applied exactly. Across subjects, points with the same
        canonical coordinates correspond (see `phantom_ageing.locate`).

        Args:
            points: ``(N, 3)`` mm in the recorded frame of the first visit.
            first: row of its visit in the table, as ``PairBatch.session`` gives it.
            second: row of the other visit.

        Returns:
            ``(N, 3)`` mm in the recorded frame of the second visit, float64.
        """
        index, visit = self._visit_number(first)
        index2, visit2 = self._visit_number(second)
        rigid = residual(self.seed, index, visit, self.spacing)
        true = rigid[:3, :3] @ points.double().T + rigid[:3, 3:]
        common = canonical(self.subject(index), true, self.time(index, visit))
        there = locate(self.subject(index2), common, self.time(index2, visit2))
        rigid = residual(self.seed, index2, visit2, self.spacing)
        return (rigid[:3, :3].T @ (there - rigid[:3, 3:])).T

    def volumes(self, index: int, visit: int) -> dict[int, float]:
        """True volume of each label in mm³, free of voxel effects; see :func:`phantom_ageing.volumes`.

        Voxel counts of a label map differ: a voxel less than half filled by a sulcus belongs to the cortex.
        """
        return volumes(self.subject(index), self.time(index, visit))

    def rates(self, index: int) -> dict[str, float]:
        """True change of the logarithm of volumes per year, at the first visit.

        "ventricles", "hippocampus" and "cortex" are prescribed; the labels, by name, follow from them (see
        :func:`phantom_ageing.structure_rates`).
        """
        someone = self.subject(index)
        named = {STRUCTURES[label]: rate for label, rate in structure_rates(someone).items() if label in STRUCTURES}
        return {**named, **someone.rates}
