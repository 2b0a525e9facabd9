"""PairDataModule: from a table of visits to loaders of PairBatch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lssl.data.batch import Visit
from lssl.data.boxes import same_box
from lssl.data.duplicates import check_duplicates
from lssl.data.few_shot import FewShot, choose_labelled
from lssl.data.folds import Folds, fold_splits
from lssl.data.loaders import PairLoaders
from lssl.data.loading import PairDataset, PairSampler
from lssl.data.pairs import (
    ORDERED_POLICIES,
    SPLITS,
    build_pairs,
    count,
    evenly,
    order_notes,
    order_visits,
    subject_splits,
    summarise,
)
from lssl.data.partial import channel_notes
from lssl.data.samples import SampleKind, Samples, choose_samples
from lssl.data.series import build_series
from lssl.data.spacing import median_spacing, refuse_large_views, voxels_per_step
from lssl.data.targets import Target, read_targets
from lssl.data.transform import visit_transform
from lssl.utils.errors import InputError
from lssl.utils.memory import refuse_larger_than_memory

__all__ = ["PairDataModule", "PairDataset", "PairSampler"]

EACH_WORKER = 20 * 10**6  # bytes that a worker has of its own at least


class PairDataModule(PairLoaders):
    """Visit table → pairs → loaders of PairBatch.

    A subclass says which visits exist (:meth:`visit_table`) and how one is read (:meth:`read`). This class makes pairs,
    splits, order and source boxes.

    Training draws a random box around foreground. Validation and test take every pair in fixed order, with the box
    centred on the foreground. Prediction takes every whole visit of every split once, as a same-visit pair in a batch
    of its own.

    Args:
        batch_size: pairs per batch and device.
        num_workers: processes that read visits; 0 reads in the main process.
        source_size: voxels of the box that is cut from both visits and sent to the device; ``None`` sends whole visits.
            If a visit is smaller along an axis, the whole axis is taken.
        visits_per_item: 2 gives pairs; K > 2 gives series of K visits, see :mod:`.series`, for methods that take them.
            What is said here of pairs is true of series; subjects without a series are left out.
        pairs: which two visits of a subject may form a pair: ``any`` two, ``consecutive`` ones, or the ``baseline``
            with each later one. ``all`` means ``any`` with ``pairs_per_subject: all``.
        min_interval: shortest interval of a pair in years.
        max_interval: longest interval of a pair in years.
        pairs_per_subject: ``one``: each epoch draws one pair of every subject, so that subjects with many visits do
            not dominate; ``all``: each epoch takes all of them. Test takes all pairs; validation takes equally many of
            every subject.
        balance: draws pairs so that every ``site`` (a column of the table), every class of ``interval`` between the
            visits, or both have equal weight, instead of every subject. The length of an epoch does not change.
        single_visits: a subject with one visit gives a pair of the ``same`` visit twice, or is left out (``drop``).
        split: shares of subjects in train, val and test; used if the visit table has no column ``split``.
        seed: of the split, the order and the boxes.
        few_shot: which labels training may see, and how labelled visits are drawn; see :class:`.few_shot.FewShot`.
            ``None`` allows all labels. Pretraining ignores this option.
        transform: applied on the CPU to the source of each visit; a random transform must use torch's global generator.
        on_error: at a visit that cannot be read, ``stop``, or ``skip`` the pair; see :mod:`lssl.data.read_errors`.
        targets: columns to predict, name → source: ``{diagnosis: participants, score: sessions, age: visits}`` or the
            path of a table; see :mod:`.targets`. Prediction does not read them.
        folds: cross-validation by subject instead of ``split``; see :class:`.folds.Folds`.

    Attributes:
        table: after ``setup``: one row per visit, sorted by subject and time, with its split.
        subjects: after ``setup``: names of the subjects; ``Visit.subject`` is an index into it.
        train_pairs: after ``setup``: ``(pairs, 2)`` int32 rows of the table in time order; of series ``(series, K)``.
        val_pairs: the same for validation, equally many of every subject; see :func:`.pairs.evenly`.
        test_pairs: the same for test.
        targets: after ``setup``: name → column, of those that the option ``targets`` names.
        summary: after ``setup``: what was found, used and excluded, in words.
        excluded: phrases with counts: which visits were left out, and why; :meth:`visit_table` may add to them.
        notes: further phrases of the summary; :meth:`visit_table` and :meth:`inspect` may add to them.
        label_names: label value → its name, if known.
        common_frame: whether all subjects are aligned to one template.
        knows_correspondence: whether :meth:`correspond` is exact; otherwise it assumes that the visits are aligned.
    """

    common_frame: bool = False
    knows_correspondence: bool = False

    def __init__(
        self,
        batch_size: int = 2,
        num_workers: int = 0,
        source_size: int | tuple[int, int, int] | None = None,
        visits_per_item: int = 2,
        pairs: Literal["any", "consecutive", "baseline", "all"] = "any",
        min_interval: float = 0.0,
        max_interval: float | None = None,
        pairs_per_subject: Literal["one", "all"] = "one",
        balance: Literal["site", "interval", "both"] | None = None,
        single_visits: Literal["same", "drop"] = "same",
        split: tuple[float, float, float] = (0.8, 0.1, 0.1),
        seed: int = 0,
        few_shot: FewShot | None = None,
        transform: Callable[[Visit], Visit] | None = None,
        on_error: Literal["stop", "skip"] = "stop",
        targets: dict[str, str] | None = None,
        folds: Folds | None = None,
    ) -> None:
        super().__init__()
        if len(split) != 3 or min(split) < 0 or abs(sum(split) - 1) > 1e-6:
            raise InputError(f"split is {list(split)}; give three shares (train, val, test) that add up to 1.")
        if max_interval is not None and max_interval < min_interval:
            raise InputError(f"max_interval ({max_interval:g}) is below min_interval ({min_interval:g}); no pair fits.")
        least = {"batch_size": 1, "num_workers": 0, "visits_per_item": 2}
        for (name, fewest), value in zip(least.items(), (batch_size, num_workers, visits_per_item), strict=True):
            if value < fewest:
                raise InputError(f"{name} is {value}; give {fewest} or more.")
        refuse_larger_than_memory(
            EACH_WORKER * num_workers,
            f"num_workers: starting {num_workers:,} processes",
            "as many as processors are enough",
        )
        if on_error not in ("stop", "skip"):
            raise InputError(f"on_error is {on_error!r}; choose stop or skip.")
        self.batch_size, self.num_workers, self.transform = batch_size, num_workers, visit_transform(transform)
        self.source_size = (source_size,) * 3 if isinstance(source_size, int) else source_size
        if self.source_size is not None and min(self.source_size) < 1:
            raise InputError(f"source_size is {list(self.source_size)}; give at least one voxel per axis, or null.")
        self.visits_per_item, self.policy = visits_per_item, pairs
        self.min_interval, self.max_interval = min_interval, max_interval
        self.every_pair = pairs_per_subject == "all" or pairs == "all"
        self.balance, self.single_visits, self.split, self.seed = balance, single_visits, tuple(split), seed
        self.few_shot, self.on_error = few_shot or FewShot(), on_error
        self.target_sources, self.folds = dict(targets or {}), folds
        self.targets: dict[str, Target] = {}
        self.supervised = self.unlabelled_pairs = self.predicting = self.moving = False
        self.predict_pairs: np.ndarray | None = None
        self.previous: np.ndarray | None = None
        self.requires_previous = False
        self.label_names: dict[int, str] = {}
        self.voxels_per_step: np.ndarray | None = None  # of the working spacing, once a task has set it
        self.table: pd.DataFrame = pd.DataFrame()
        self.subjects: list[str] = []
        self.excluded: list[str] = []
        self.notes: list[str] = []
        self.summary = ""

    @property
    def location(self) -> str:
        """File or folder of the visits, by which a cohort is known; of data without files, the name of the class."""
        return type(self).__name__.removesuffix("DataModule").lower()

    def visit_table(self) -> pd.DataFrame:
        """One row per visit, in any order.

        Columns: ``subject`` and ``session`` (str), ``age`` (years or NaN), ``time`` (years since the subject's first
        visit or NaN), and optionally ``split`` (train, val or test) and whatever :meth:`read` needs.
        """
        raise NotImplementedError(f"{type(self).__name__} must say which visits there are, in visit_table().")

    def read(self, row: int) -> Visit:
        """Reads the whole visit in a row of the table; subject, session, age and time are filled in later."""
        raise NotImplementedError(f"{type(self).__name__} must say how a visit is read, in read(row).")

    def read_visits(
        self, rows: Sequence[int], size: tuple[int, int, int] | None, seed: int | None
    ) -> tuple[Visit, ...]:
        """Reads the same box of a subject's visits; override it if a part of a visit can be read alone.

        Args:
            rows: the visits of a pair or series; a pair may be twice the same row.
            size: voxels of the box; ``None`` takes whole visits.
            seed: draws a foreground voxel as the centre; ``None`` takes the centre of the foreground.
        """
        read = {row: self.read(row) for row in dict.fromkeys(rows)}
        visits = tuple(read[row] for row in rows)
        return visits if size is None else same_box(visits, size, seed)

    def reader(self) -> PairDataModule:
        """A copy for the workers, without the trainer, which cannot be sent to spawned workers."""
        reader = copy.copy(self)
        reader.trainer = None
        return reader

    def inspect(self, table: pd.DataFrame) -> None:
        """Called once with the sorted table, before pairs are made, to check files and keep what :meth:`read` needs."""

    def shapes(self) -> np.ndarray:
        """``(visits, 3)`` voxels per axis. Default: those of the first visit for all; override it to read headers."""
        first = self.read(0).foreground.shape
        return np.tile(np.array(first), (len(self.table), 1))

    def read_label(self, row: int) -> np.ndarray | None:
        """``(D, H, W)`` int16 label map of a visit, ``None`` without one; override it if labels can be read alone."""
        label = self.read(row).label
        return None if label is None else label.numpy()

    def has_label(self) -> np.ndarray:
        """``(visits,)`` bool. Default: that of the first visit for all; override it if the table knows."""
        return np.full(len(self.table), self.read(0).label is not None)

    def channels(self) -> list[str]:
        """Names of the images' channels, in order. Default: those of the first visit."""
        self.setup()
        return [f"channel {number}" for number in range(len(self.read(0).image))]

    def present(self) -> np.ndarray | None:
        """``(visits, C)`` bool, which channels each visit has. Default ``None``: all visits have all."""
        return None

    def voxel_sizes(self) -> np.ndarray:
        """``(visits, 3)`` mm. Default: those of the first visit for all; override it to read headers."""
        return np.tile(np.linalg.norm(self.read(0).affine[:3, :3].numpy(), axis=0), (len(self.table), 1))

    def working_spacing(self) -> np.ndarray:
        """``(3,)`` mm, the median voxel size of the training visits."""
        self.setup()
        return median_spacing(self.voxel_sizes(), (self.table["split"] == "train").to_numpy())

    def resample_to(self, spacing: np.ndarray) -> np.ndarray:
        """Loads boxes for views of this spacing; ``(visits, 3)`` voxels of each visit in a step of it."""
        self.setup()
        self.voxels_per_step = voxels_per_step(self.voxel_sizes(), spacing)
        return self.voxels_per_step

    def setup(self, stage: str | None = None) -> None:
        """Builds the table and the pairs, once."""
        if len(self.table):
            return
        self.predicting = stage == "predict"
        self.excluded, self.notes = [], []
        table = order_visits(self.visit_table())
        self.inspect(table)
        self.notes += order_notes(table)
        limits = self.min_interval, self.max_interval
        index = build_pairs(table, self.policy, *limits)
        if self.policy in ORDERED_POLICIES and not len(index.pairs) and (table["ordered_by"] == "").any():
            raise InputError(
                f"pairs is {self.policy}, which needs the order of visits, but {'; '.join(order_notes(table))}; give "
                f"dates or ages (in sessions.tsv, scans.tsv or a table), or set pairs to any."
            )
        self._subject = index.subject
        self.subjects = table["subject"].iloc[np.flatnonzero(np.diff(index.subject, prepend=-1))].tolist()
        if not self.predicting:
            self.targets = read_targets(table, self.target_sources, self.location)
        known = table.assign(**{name: target.texts() for name, target in self.targets.items() if name not in table})
        part = (
            subject_splits(table, self.subjects, index, self.split, self.seed)
            if self.folds is None
            else fold_splits(known, index.subject, self.folds, self.seed)
        )
        self.table = table.assign(split=pd.Categorical(np.array(SPLITS)[part[index.subject]], categories=SPLITS))
        if (present := self.present()) is not None:
            self.notes += channel_notes(table, present, self.channels(), stage == "fit")
        if stage == "fit" and (copies := check_duplicates(self.table)):
            self.notes.append(copies)
        self._age, self._time = (table[name].to_numpy(np.float32) for name in ("age", "time"))
        if self.visits_per_item > 2:
            index = build_series(table, index, self.policy, limits, self.visits_per_item)
        singles = index.singles[:0] if self.single_visits == "drop" else index.singles
        used = np.concatenate([index.pairs, np.repeat(singles[:, None], self.visits_per_item, 1)])
        used = used[np.lexsort(used.T[::-1])]
        self._pairs, part_of_pair = used, part[index.subject[used[:, 0]]]
        self.train_pairs, val_pairs, self.test_pairs = (used[part_of_pair == value] for value in range(3))
        self.val_pairs = evenly(val_pairs, index.subject)
        if self.single_visits == "drop" and len(index.singles):
            self.excluded.append(f"{count(len(index.singles), 'single visit')} (single_visits: drop)")
        self.excluded += index.excluded
        self.summary = summarise(self.table, index, singles, self.excluded, self.notes)
        rank_zero_info(self.summary)

    def use_targets(self, name: str, kind: SampleKind) -> Samples:
        """Switches the loaders to visits or pairs whose target is known; prediction takes all.

        Args:
            name: of a target. Prediction, which reads none, accepts any.
            kind: ``one`` visit, the ``first`` visit, or ``pair``; see :func:`.samples.choose_samples`.
        """
        if not self.predicting and name not in self.targets:
            raise InputError(
                f"data.init_args.targets: '{name}' is to be predicted, but is not among them ({list(self.targets)}); "
                f"say where it is, as in {{{name}: participants}}."
            )
        values = self.targets[name].values if name in self.targets else None
        samples = choose_samples(self.table, self._subject, self._pairs, kind, values, name)
        self.train_pairs, self.val_pairs, self.test_pairs = (samples.known[part] for part in SPLITS)
        self.predict_pairs = samples.every
        return samples

    def labelled_rows(self, split: str) -> np.ndarray:
        """Rows of the table whose labels may be seen: in training, those that ``few_shot`` chooses.

        If labels are used with previous visits, rows without one are left out.
        """
        usable = (self.table["split"] == split).to_numpy() & self.has_label()
        rows = np.flatnonzero(usable if self.previous is None else usable & (self.previous >= 0))
        return choose_labelled(rows, self._subject, self.few_shot) if split == "train" else rows

    def check_crop(self, size: Sequence[int]) -> None:
        """Raises InputError if a view of this size does not fit into the source of every visit.

        Args:
            size: voxels of the view per axis, of the working spacing.
        """
        self.setup()
        refuse_large_views(size, self.shapes(), self.voxels_per_step, self.source_size, self.table)

    def use_motion(self) -> None:
        """Batches tell how tissue moves between the visits of a pair (:mod:`.motion`).

        Raises:
            InputError: if these data do not know; by default, they do if their correspondence is exact.
        """
        if not self.knows_correspondence:
            raise InputError(
                f"views.correspondence is field, and {type(self).__name__} does not know how tissue moves between "
                f"visits; run `lssl prepare --nonrigid` and use its folder, or leave views.correspondence at rigid."
            )
        self.moving = True

    def moved(self, points: np.ndarray, row: int, other: int) -> np.ndarray:
        """Where the tissue at points ``(N, 3)`` mm of one visit lies at another of the subject; default: the truth."""
        return self.correspond(torch.from_numpy(points), row, other).numpy()

    def correspond(self, points: Tensor, first: int, second: int) -> Tensor:
        """True positions, in a second visit, of points of a first visit. Default: a subject's visits are aligned.

        Args:
            points: ``(N, 3)`` mm in the recorded frame of the first visit.
            first: row of its visit in the table, as ``PairBatch.session`` gives it.
            second: row of the other visit.

        Returns:
            ``(N, 3)`` mm in the recorded frame of the second visit; NaN for another subject's visit.
        """
        same = self._subject[first] == self._subject[second]
        return points.double() if same else torch.full(points.shape, float("nan"), dtype=torch.float64)
