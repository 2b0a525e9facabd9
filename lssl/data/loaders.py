"""PairLoaders: the loaders of a datamodule: pairs, labelled visits, whole visits, and samples with targets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lssl.data.balance import balanced_weights
from lssl.data.batch import Visit
from lssl.data.few_shot import FewShot, repeated
from lssl.data.loading import PairDataset, PairSampler, continue_training, pair_loader, reading_rate, same_length
from lssl.data.pairs import count, item_name, name_bytes
from lssl.data.previous import Previous, previous_visits
from lssl.data.read_errors import SkipList
from lssl.data.spacing import BoxReader
from lssl.data.targets import Target
from lssl.data.whole_batches import WholeBatches
from lssl.utils.distributed import rank, world_size
from lssl.utils.errors import InputError

__all__ = ["PairLoaders"]


class PairLoaders(L.LightningDataModule):
    """Loaders of what :class:`lssl.data.datamodule.PairDataModule` has set up; its attributes are described there."""

    batch_size: int
    num_workers: int
    source_size: tuple[int, int, int] | None
    balance: str | None
    every_pair: bool
    single_visits: str
    seed: int
    few_shot: FewShot
    on_error: str
    transform: Callable[[Visit], Visit] | None
    voxels_per_step: np.ndarray | None
    supervised: bool
    previous: np.ndarray | None
    requires_previous: bool
    unlabelled_pairs: bool
    predicting: bool
    moving: bool
    visits_per_item: int
    table: pd.DataFrame
    summary: str
    targets: dict[str, Target]
    train_pairs: np.ndarray
    val_pairs: np.ndarray
    test_pairs: np.ndarray
    predict_pairs: np.ndarray | None
    _subject: np.ndarray
    _age: np.ndarray
    _time: np.ndarray

    @abstractmethod
    def reader(self) -> Any:
        """A copy of the datamodule for the workers."""

    @abstractmethod
    def labelled_rows(self, split: str) -> np.ndarray:
        """Rows of the table whose labels may be seen."""

    @abstractmethod
    def has_label(self) -> np.ndarray:
        """``(visits,)`` bool."""

    def use_labels(self, unlabelled_pairs: bool, previous: Previous = "no") -> None:
        """Switches the loaders to training on labels.

        Training then gives a dict of batches: ``labelled`` visits, each as a same-visit pair, and optionally
        ``unlabelled`` pairs of all training subjects, with their labels hidden. Validation takes each labelled whole
        visit once; test takes every whole visit once.

        Args:
            unlabelled_pairs: whether training gives them.
            previous: ``required`` pairs every visit with its previous one instead, see
                :func:`.previous.previous_visits`. Visits without one are left out, also in prediction; test takes
                labelled visits alone. ``where known`` does so too, but keeps visits without one as same-visit pairs.
        """
        self.supervised, self.unlabelled_pairs = True, unlabelled_pairs
        self.requires_previous = previous == "required"
        self.previous = None if previous == "no" else previous_visits(self.table, self._subject)
        if self.previous is not None and previous == "where known":
            self.previous = np.where(self.previous < 0, np.arange(len(self.table)), self.previous).astype(np.int32)
        if self.previous is not None and self.requires_previous:
            rows = np.arange(len(self.table)) if self.predicting else np.flatnonzero(self.has_label())
            if lost := int((self.previous[rows] < 0).sum()):
                kind = "visit" if self.predicting else "labelled visit"
                rank_zero_info(f"{count(lost, kind)} left out, without an earlier visit of known order.")

    @property
    def _items(self) -> str:
        return "pairs of visits" if self.visits_per_item == 2 else item_name(self.visits_per_item)

    def _as_pairs(self, rows: np.ndarray) -> np.ndarray:
        """``(pairs, 2)``: each visit twice, or with its previous one."""
        return np.stack([rows if self.previous is None else self.previous[rows], rows], 1).astype(np.int32)

    def train_dataloader(self) -> DataLoader | dict[str, DataLoader]:
        """Pairs with random boxes, in the order of :class:`PairSampler`; see :meth:`use_labels` for the dict.

        In a resumed run, the loaders start where the checkpoint was written.
        """
        if not self.supervised:
            pairs = self._train_pairs()
            continue_training([pairs], self.trainer)
            dataset: Any = pairs.dataset
            most = len(pairs.sampler)  # type: ignore[arg-type]
            if self.batch_size > most:
                rank_zero_info(f"batch_size is {self.batch_size:,}, and an epoch has {most}: each step takes all.")
            if rate := reading_rate(dataset, min(self.batch_size, most), self.num_workers):
                rank_zero_info(rate)
            return pairs
        rows = repeated(self.labelled_rows("train"), self.few_shot, self.trainer)
        dataset = self._dataset(self._as_pairs(rows), self.source_size)
        sampler = PairSampler(dataset, True, self.seed)
        loaders = {"labelled": pair_loader(dataset, self.few_shot.batch_size, self.num_workers, sampler=sampler)}
        if self.unlabelled_pairs:
            loaders["unlabelled"] = self._train_pairs(np.zeros(len(self.table), dtype=bool))
        same_length(loaders)
        continue_training(loaders.values(), self.trainer)
        return dict(loaders)

    def _train_pairs(self, visible: np.ndarray | None = None) -> DataLoader:
        if not len(self.train_pairs):
            raise InputError(f"There are no {self._items} to train on, because of this: {self.summary}")
        dataset = self._dataset(self.train_pairs, self.source_size, visible)
        weights = None
        if self.balance:
            weights = balanced_weights(self.table, self._subject, self.train_pairs, self.balance, self.every_pair)
        sampler = PairSampler(dataset, self.every_pair, self.seed, weights)
        drop_last = len(sampler) > self.batch_size
        return pair_loader(dataset, self.batch_size, self.num_workers, sampler=sampler, drop_last=drop_last)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Every validation pair with its centred box, in fixed order; an empty list if there are no pairs."""
        if self.supervised:
            rows = self.labelled_rows("val")
            return self._whole(rows) if len(rows) else []
        return self._fixed(self.val_pairs)

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """Every test pair with its centred box, in fixed order."""
        if self.supervised and self.requires_previous:
            return self._whole(self.labelled_rows("test"))
        if self.supervised:
            return self._whole(np.flatnonzero(self.table["split"] == "test"))
        if not len(self.test_pairs):
            raise InputError(f"There are no {self._items} to test on, because of this: {self.summary}")
        return self._fixed(self.test_pairs)

    def predict_dataloader(self) -> DataLoader:
        """Every whole visit once, as a same-visit pair or after its previous one; one per batch, so none is padded.

        After :meth:`PairDataModule.use_targets`, every sample with its centred box.
        """
        if self.predict_pairs is None:
            rows = np.arange(len(self.table))
            rows = rows if self.previous is None else rows[self.previous >= 0]
            if not len(rows):
                raise InputError(f"No visit has an earlier one of known order, because of this: {self.summary}")
            return self._whole(rows)
        if not len(self.predict_pairs):
            raise InputError(f"There is nothing to predict from, because of this: {self.summary}")
        return pair_loader(self._dataset(self.predict_pairs, self.source_size), self.batch_size, self.num_workers)

    def fixed_pairs(self, most: int) -> DataLoader:
        """At most so many training pairs with their centred boxes, spread over the subjects, in fixed order."""
        places = np.unique(np.linspace(0, len(self.train_pairs) - 1, most).round().astype(int))
        dataset = self._dataset(self.train_pairs[places], self.source_size)
        return pair_loader(dataset, self.batch_size, 0)

    def _whole(self, rows: np.ndarray) -> DataLoader:
        return pair_loader(self._dataset(self._as_pairs(rows), None), 1, self.num_workers)

    def _fixed(self, pairs: np.ndarray) -> DataLoader | list[DataLoader]:
        if not len(pairs):
            return []
        dataset = self._dataset(pairs, self.source_size)
        share = WholeBatches(dataset, self.batch_size, world_size(), rank()) if world_size() > 1 else None
        options = {} if share is None else {"sampler": share}
        return pair_loader(dataset, self.batch_size, self.num_workers, **options)

    def _dataset(
        self, pairs: np.ndarray, size: tuple[int, int, int] | None, visible: np.ndarray | None = None
    ) -> PairDataset:
        folder = self.trainer.default_root_dir if self.trainer else None
        pair = pairs.shape[1] == 2
        if self.moving and not pair:
            raise InputError(
                f"views.correspondence is field, which tells how tissue moves between two visits, and "
                f"data.init_args.visits_per_item is {self.visits_per_item}; set it to 2, or leave views.correspondence "
                f"at rigid."
            )
        same_visit = pair and self.single_visits == "same" and not self.requires_previous
        skips = SkipList(folder, same_visit) if self.on_error == "skip" else None
        rest = (self._subject, self._age, self._time, size, self.transform, visible, name_bytes(self.table), skips)
        columns = [target.values for target in self.targets.values()]
        targets = np.stack(columns, 1) if columns else None
        reader = self.reader()
        moved = reader.moved if self.moving else None
        return PairDataset(BoxReader(reader.read_visits, self.voxels_per_step), pairs, *rest, targets, moved)
