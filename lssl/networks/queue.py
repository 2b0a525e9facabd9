"""KeyQueue: the newest keys and their subjects."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lssl.utils.distributed import gather
from lssl.utils.errors import positive

__all__ = ["KeyQueue"]


class KeyQueue(nn.Module):
    """The newest ``size`` keys of all ranks; a new key overwrites the oldest (MoCo, He et al., 2020).

    Args:
        size: number of keys K. Choose at most half the number of subjects: a larger queue repeats subjects.
        features: width of a key.
    """

    keys: Tensor
    subject_ids: Tensor
    pointer: Tensor

    def __init__(self, size: int, features: int) -> None:
        super().__init__()
        positive(queue=size)
        self.register_buffer("keys", torch.zeros(size, features))
        self.register_buffer("subject_ids", torch.full((size,), -1, dtype=torch.long))  # -1 in empty slots
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))  # of the oldest key

    @torch.no_grad()
    def push(self, keys: Tensor, subject: Tensor) -> None:
        """Adds keys ``(N, D)`` and their subject ids ``(N,)`` of all ranks, in rank order."""
        keys, subject = gather(keys.detach().to(self.keys.dtype)), gather(subject)
        keys, subject = keys[-len(self.keys) :], subject[-len(self.keys) :]
        slots = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.keys)
        self.keys[slots], self.subject_ids[slots] = keys, subject
        self.pointer.copy_((self.pointer + len(keys)) % len(self.keys))
