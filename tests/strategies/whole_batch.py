"""Random numbers of a rank's pairs that are those the pairs get in the whole batch, so that both may be compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from lssl.strategies import anatomical_embedding
from lssl.utils import random


class Draws(np.random.Generator):
    """Draws for all pairs, of which it gives those of some; what is not drawn pair by pair is the same on all ranks."""

    def __init__(self, seed: int, rows: slice, own: int, pairs: int) -> None:
        super().__init__(np.random.PCG64(seed))
        self.rows, self.own, self.pairs = rows, own, pairs

    def random(self, size: Any = None, *rest: Any, **options: Any) -> Any:
        if not isinstance(size, tuple) or size[0] != self.own:
            return super().random(size, *rest, **options)
        return super().random((self.pairs, *size[1:]), *rest, **options)[self.rows]

    def integers(self, low: Any, high: Any = None, size: Any = None, **options: Any) -> Any:
        if not isinstance(size, tuple) or size[0] != self.own:
            return super().integers(low, high, size, **options)
        return super().integers(low, high, (self.pairs, *size[1:]), **options)[self.rows]


@contextmanager
def draws_of_the_whole_batch(rows: slice, own: int, pairs: int) -> Iterator[None]:
    """Inside this context, draws are those of the ``own`` pairs that are ``rows`` of a batch of ``pairs``."""
    original, seeded = torch.rand, random.seeded

    def rand(*shape: Any, **options: Any) -> torch.Tensor:
        first, *rest = shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape
        if options.get("generator") is None or first % own:
            return original(*shape, **options)
        everyone = original(first // own * pairs, *rest, **options)
        return everyone.unflatten(0, (first // own, pairs))[:, rows].flatten(0, 1)

    def planned(seed: int) -> Draws:
        return Draws(seed, rows, own, pairs)

    torch.rand, random.seeded, anatomical_embedding.seeded = rand, planned, planned
    try:
        yield
    finally:
        torch.rand, random.seeded, anatomical_embedding.seeded = original, seeded, seeded
