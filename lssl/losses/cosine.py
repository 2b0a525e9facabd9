"""Cosines of vectors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["cosine"]


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """``(...)`` cosines of vectors ``(..., D)``; that of a zero vector is 0.

    As torch's ``cosine_similarity``, without its copies of both inputs.

    Example:
        >>> import torch
        >>> round(cosine(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])).item(), 4)
        0.6
    """
    return (F.normalize(one, dim=-1) * F.normalize(other, dim=-1)).sum(-1)
