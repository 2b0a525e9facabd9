"""Dataset, sampler and loader of pairs: what is read for a pair, and the order of pairs in an epoch."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lssl.data import STEP
from lssl.data.batch import Visit, collate
from lssl.data.motion import Moved, with_motion
from lssl.data.pairs import item_name
from lssl.data.read_errors import FAILURES, FilledLoader, SkipList, collate_readable, other_pairs, read_error
from lssl.utils.errors import InputError
from lssl.utils.workers import check_workers, start_worker

__all__ = [
    "PairDataset",
    "PairLoader",
    "PairSampler",
    "continue_training",
    "pair_loader",
    "reading_rate",
    "same_length",
]


SLOW = 0.5  # seconds of reading, after which one pair is enough to tell the rate
VOXEL = 5  # bytes of one channel (int16), foreground and label


class PairDataset(Dataset[tuple[Visit, ...] | None]):
    """Reads the same source box of the two visits of a pair, or of the K visits of a series.

    The index is the number of a pair, for the box centred on the foreground, or ``(row, row, seed)``, for a random box.
    The dataset holds only flat arrays, so workers share them without copying.

    Args:
        read: reads the visits of a pair, see :meth:`PairDataModule.read_visits`.
        pairs: ``(pairs, 2)`` rows of the visit table, or ``(series, K)``.
        subject: ``(visits,)`` number of each row's subject.
        age: ``(visits,)`` years, NaN where unknown.
        time: ``(visits,)`` years since the subject's first visit, NaN where unknown.
        size: voxels of the source box; ``None`` takes the whole visit.
        transform: applied to each visit's source.
        visible: ``(visits,)`` bool, the rows whose labels may be seen; ``None`` shows all labels.
        names: ``(visits,)`` bytes, names of the visits for messages.
        skips: where pairs that cannot be read are listed; ``None`` stops at the first. See :mod:`.read_errors`.
        targets: ``(visits, T)`` float32, NaN where unknown; ``None`` without targets.
        moved: where the tissue of a visit lies at another; ``None`` reads no motion. See :mod:`.motion`.
    """

    def __init__(
        self,
        read: Callable[[Sequence[int], tuple[int, int, int] | None, int | None], tuple[Visit, ...]],
        pairs: np.ndarray,
        subject: np.ndarray,
        age: np.ndarray,
        time: np.ndarray,
        size: tuple[int, int, int] | None = None,
        transform: Callable[[Visit], Visit] | None = None,
        visible: np.ndarray | None = None,
        names: np.ndarray | None = None,
        skips: SkipList | None = None,
        targets: np.ndarray | None = None,
        moved: Moved | None = None,
    ) -> None:
        self.read, self.pairs, self.subject, self.age, self.time = read, pairs, subject, age, time
        self.size, self.transform, self.visible = size, transform, visible
        self.names, self.skips, self.targets, self.moved = names, skips, targets, moved

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int | tuple[int, ...]) -> tuple[Visit, ...] | None:
        drawn = isinstance(index, tuple)
        *wanted, seed = index if isinstance(index, tuple) else (*self.pairs[index].tolist(), index)
        found = self._readable(tuple(wanted), seed, drawn)
        if found is None:
            return None
        rows, visits = found
        visits = tuple(self.named(visit, row) for visit, row in zip(visits, rows, strict=True))
        if self.transform is not None:
            visits = self._transformed(self.transform, visits, rows, seed)
        return visits if self.moved is None else with_motion(visits, self.moved)

    def _transformed(
        self, transform: Callable[[Visit], Visit], visits: Sequence[Visit], rows: Sequence[int], seed: int
    ) -> tuple[Visit, ...]:
        """Each visit's own transform, also of a visit that is there twice."""
        own = []
        for place, visit in enumerate(map(self._scaled, visits)):
            own.append(copy.deepcopy(visit) if rows[place] in rows[:place] else visit)
        with torch.random.fork_rng(devices=[]):  # a transform's draws must not depend on the worker
            torch.manual_seed(seed)
            return tuple(_emptied(transform(visit)) for visit in own)

    def _readable(
        self, rows: tuple[int, ...], seed: int, drawn: bool
    ) -> tuple[tuple[int, ...], tuple[Visit, ...]] | None:
        """The pair, or another of its subject that can be read; ``None`` leaves the subject out."""
        failures: list[InputError] = []
        for chosen in self._candidates(rows, seed, drawn):
            try:
                visits = self.read(chosen, self.size, seed if drawn else None)
            except FAILURES as error:
                failures.append(read_error(error, self._names(chosen)))
                if self.skips is None:
                    raise failures[0] from (error.__cause__ if failures[0] is error else error)
                continue
            if failures and self.skips is not None:
                self.skips.add(self._names(rows), failures[0], self._names(chosen))
            return chosen, visits
        if self.skips is None or not self.skips.alone:
            raise failures[0]
        self.skips.add(self._names(rows), failures[0], "nothing")
        return None

    def _candidates(self, rows: tuple[int, ...], seed: int, drawn: bool) -> Iterator[tuple[int, ...]]:
        yield rows
        if self.skips is not None and drawn:
            yield from other_pairs(self.pairs, self.subject, rows, seed, self.skips.same_visit)

    def _names(self, rows: tuple[int, ...]) -> str:
        if self.names is None:
            return f"the visits in rows {' and '.join(map(str, rows))}"
        return " and ".join(dict.fromkeys(self.names[row].decode() for row in rows))

    @staticmethod
    def _scaled(visit: Visit) -> Visit:
        """Float32, as transforms expect it."""
        if visit.image.dtype != torch.int16:
            return visit
        return dataclasses.replace(visit, image=visit.image.float() * STEP)

    def named(self, visit: Visit, row: int) -> Visit:
        """A visit as read, with what the arrays know of it."""
        age = float(self.age[row]) if math.isnan(visit.age) else visit.age
        time = float(self.time[row]) if math.isnan(visit.time) else visit.time
        label = visit.label if self.visible is None or self.visible[row] else None
        found = {"subject": int(self.subject[row]), "session": row, "age": age, "time": time, "label": label}
        targets = None if self.targets is None else torch.from_numpy(self.targets[row].copy())
        return dataclasses.replace(visit, **found, targets=targets)  # type: ignore[arg-type]


def _emptied(visit: Visit) -> Visit:
    """A transform may have added noise to a channel that the visit lacks."""
    if visit.present is None:
        return visit
    return dataclasses.replace(visit, image=visit.image * visit.present[:, None, None, None])


def reading_rate(dataset: PairDataset, batch_size: int, workers: int) -> str:
    """How fast pairs are read, by the first two of the dataset, and from which step time on that is enough.

    Args:
        dataset: pairs.
        batch_size: pairs per step.
        workers: processes that read.

    Returns:
        A sentence; empty if a pair cannot be read, which the loader reports when it comes to it.
    """
    start, number = time.perf_counter(), 0
    for rows in dataset.pairs[:2].tolist():
        if number and time.perf_counter() - start > SLOW:
            break
        try:
            visits = dataset.read(rows, dataset.size, number)
            if dataset.moved is not None:
                with_motion(list(map(dataset.named, visits, rows)), dataset.moved)
        except FAILURES:
            return ""
        number += 1
    each = (time.perf_counter() - start) / max(1, number)
    one, several = (item_name(dataset.pairs.shape[1], many) for many in (1, 2))
    step = f"{batch_size} {several if batch_size > 1 else one}"
    if not workers:
        return f"Reading a {one} takes {_ms(each)}, and a step of {step} waits for it, as there are no workers."
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rate = min(workers, cores) / max(each, 1e-9)
    return (
        f"Reading a {one} takes {_ms(each)}, so {workers} workers on {cores} processors read about {rate:.3g} "
        f"{several} a second: steps of {step} shorter than {_ms(batch_size / rate)} would wait for data."
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds > 0.1 else f"{1000 * seconds:.3g} ms"


class PairSampler(DistributedSampler):
    """Yields ``(row, later row, seed)`` for each item of one epoch of this rank: the order of training.

    Of series, it yields their K rows and a seed.

    The order is a function of (seed, epoch, position) alone. Iterating changes nothing, so it does not matter how many
    workers there are, how far they prefetch, or how often Lightning makes an iterator.

    Every draw of a pass comes from one generator seeded by (seed, epoch, pass), so all ranks agree on the order. Each
    rank then takes every W-th pair; a list that does not divide evenly is continued from its beginning, so all ranks
    have equally many items. An epoch is one pass, unless :meth:`lengthen` asks for more.

    Args:
        dataset: the training pairs, sorted by subject.
        every_pair: takes all pairs in each pass, instead of one random pair per subject.
        seed: of the whole order.
        weights: ``(pairs,)``; pairs are then drawn by weight, with replacement. The length of a pass does not change.

    Attributes:
        epoch: the epoch that iterating yields; Lightning calls :meth:`set_epoch` before each.
        start: items of this epoch and rank that are skipped, because an interrupted run has used them.
    """

    def __init__(self, dataset: PairDataset, every_pair: bool, seed: int, weights: np.ndarray | None = None) -> None:
        world, rank = 1, 0
        if distributed.is_available() and distributed.is_initialized():
            world, rank = distributed.get_world_size(), distributed.get_rank()
        super().__init__(dataset, num_replicas=world, rank=rank, shuffle=True, seed=seed)
        self.pairs = dataset.pairs
        subject = dataset.subject[self.pairs[:, 0]]
        first = np.arange(len(subject)) if every_pair else np.flatnonzero(np.diff(subject, prepend=-1))
        self.first = torch.from_numpy(first)
        self.number = torch.from_numpy(np.diff(first, append=len(subject)))
        self.per_pass = self.num_samples = math.ceil(len(first) / world)
        self.start = 0
        self.cumulative = None if weights is None else torch.from_numpy(np.cumsum(weights))

    def lengthen(self, items: int) -> None:
        """Makes an epoch of so many items on each rank, from as many passes as that takes."""
        self.num_samples = items

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch; another one than the current starts at its first item."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def continue_at(self, epoch: int, items: int) -> None:
        """Chooses the epoch and skips its first items, of which nothing is read."""
        self.epoch, self.start = epoch, items

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        before, after = self.start // self.per_pass, math.ceil(self.num_samples / self.per_pass)
        items = chain.from_iterable(map(partial(self._one_pass, self.epoch), range(before, after)))
        skipped = before * self.per_pass
        return islice(items, self.start - skipped, max(self.start, self.num_samples) - skipped)

    def _one_pass(self, epoch: int, number: int) -> Iterator[tuple[int, ...]]:
        mixed = np.random.SeedSequence([self.seed, epoch, number]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(mixed >> np.uint64(1)))
        draw = torch.rand(len(self.first), dtype=torch.float64, generator=generator)
        chosen = self.first + (draw * self.number).long()
        if self.cumulative is not None:
            chosen = torch.searchsorted(self.cumulative, draw * self.cumulative[-1], right=True)
            chosen = chosen.clamp_max(len(self.pairs) - 1)
        order = chosen[torch.randperm(len(chosen), generator=generator)]
        total = self.per_pass * self.num_replicas
        order = order.repeat(math.ceil(total / len(order)))[:total]
        seeds = torch.randint(2**62, (total,), generator=generator)
        mine = slice(self.rank, None, self.num_replicas)
        rows = self.pairs[order[mine].numpy()]
        return zip(*rows.T.tolist(), seeds[mine].tolist(), strict=True)


class PairLoader(DataLoader):
    """A DataLoader that a run may resume within an epoch: its sampler starts where the run was interrupted.

    The trainer's progress holds that position. The two methods only tell Lightning that the loader is resumable.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing."""


def pair_loader(dataset: PairDataset, batch_size: int, num_workers: int, **options: Any) -> DataLoader:
    """Batches of a dataset as PairBatch; ``options`` are further ones of torch's DataLoader."""
    voxels = math.prod(dataset.size) if dataset.size else 0
    check_workers(num_workers, dataset.pairs.shape[1] * batch_size * voxels * VOXEL)
    skips = dataset.skips is not None
    loader: type[DataLoader] = FilledLoader if skips and "sampler" not in options else PairLoader
    return loader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate_readable if skips else collate,
        worker_init_fn=start_worker,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(torch.initial_seed()),  # an iterator must not draw from the global one
        **options,
    )


def same_length(loaders: Mapping[str, DataLoader]) -> None:
    """Lengthens the epochs of shorter training loaders to that of the longest, so that none starts over within one."""
    longest = max(map(len, loaders.values()))
    for loader in loaders.values():
        if len(loader) < longest:
            cast(PairSampler, loader.sampler).lengthen(longest * int(loader.batch_size or 1))


def continue_training(loaders: Iterable[DataLoader], trainer: L.Trainer | None) -> bool:
    """Sets training loaders to where a trainer stands, or is to resume; returns whether that changed anything.

    Args:
        loaders: of training. Those without a :class:`PairSampler` are left as they are.
        trainer: its progress counts; without one, loaders stay at their first epoch.
    """
    if trainer is None:
        return False
    loop: Any = trainer.fit_loop
    batches = loop.epoch_loop.batch_progress.current.ready if loop.restarting else 0
    changed = False
    for loader in loaders:
        if isinstance(sampler := loader.sampler, PairSampler):
            place = loop.epoch_progress.current.processed, batches * int(loader.batch_size or 1)
            changed |= place != (sampler.epoch, sampler.start)
            sampler.continue_at(*place)
    return changed
