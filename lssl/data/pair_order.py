"""The order in which a pair's visits are presented."""

from __future__ import annotations

import torch

from lssl.data.batch import PairBatch

__all__ = ["in_random_order"]


def in_random_order(batch: PairBatch, generator: torch.Generator) -> PairBatch:
    """The same pairs; of about half of them the second visit comes first.

    Views of the two visits are not drawn alike: the second view is placed around the first. Where the later visit
    always came second, a network could tell it by how its view was cut.

    Args:
        batch: pairs, in time order or not.
        generator: on the CPU.
    """
    first = (torch.rand(len(batch), generator=generator) < 0.5).long()
    return batch.visits(torch.stack([first, 1 - first], 1))
