"""WholeBatches: shares an evaluation between devices, so that every pair counts once and figures are those of one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sized
from typing import Any

from torch.utils.data import DistributedSampler

__all__ = ["WholeBatches", "place_of_batch", "size_of"]


class WholeBatches(DistributedSampler):
    """Gives each of W ranks every W-th *batch* of a dataset in fixed order.

    So a batch holds the same pairs as on one device. All ranks have equally many batches, since a rank with fewer would
    let the others wait (DDP exchanges buffers at each step): a rank that lacks one repeats an earlier batch, which
    :meth:`place` tells, so that it is not counted.

    Args:
        dataset: of at least one item.
        batch_size: items of a batch.
        world: number of ranks.
        rank: this one.
    """

    def __init__(self, dataset: Sized, batch_size: int, world: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=world, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.items, self.batch_size = len(dataset), batch_size
        self.batches = math.ceil(self.items / batch_size)

    def place(self, batch_idx: int) -> tuple[int, bool]:
        """Number of this rank's batch among those of all, and whether it counts, as it is no repetition.

        Args:
            batch_idx: number of the batch on this rank.
        """
        number = batch_idx * self.num_replicas + self.rank
        return number % self.batches, number < self.batches

    def _mine(self) -> Iterator[range]:
        for batch in range(math.ceil(self.batches / self.num_replicas)):
            start = self.place(batch)[0] * self.batch_size
            yield range(start, min(start + self.batch_size, self.items))

    def __iter__(self) -> Iterator[Any]:
        for batch in self._mine():
            yield from batch

    def __len__(self) -> int:
        return sum(map(len, self._mine()))


def place_of_batch(loaders: Any, batch_idx: int, world: int, rank: int) -> tuple[int, bool]:
    """See :meth:`WholeBatches.place`; batches of any other loader count, each as one more.

    Args:
        loaders: of the evaluation.
        batch_idx: number of the batch on this rank.
        world: number of ranks.
        rank: this one.
    """
    sampler = getattr(loaders, "sampler", None)
    return sampler.place(batch_idx) if isinstance(sampler, WholeBatches) else (batch_idx * world + rank, True)


def size_of(batch: Any) -> int:
    """Number of pairs in a batch, or in the first of several batches; 0 if that one could not be read."""
    first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch
    return 0 if first is None else len(first)
