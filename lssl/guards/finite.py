"""What is not finite among tensors, which may be spread over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from lssl.utils.distributed import every_rank, local, world_size

__all__ = ["largest_of", "not_finite", "of_all_ranks"]


def largest_of(gradients: list[Tensor]) -> Tensor:
    """The largest absolute value; of gradients that are spread over ranks, that of all, infinite for NaN."""
    own = [share for gradient in gradients if (share := local(gradient)).numel()]
    largest = torch.nn.utils.get_total_norm(own, norm_type=torch.inf)
    if world_size() > 1 and any(isinstance(gradient, DTensor) for gradient in gradients):
        largest = largest.nan_to_num(nan=torch.inf)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return largest


def of_all_ranks(names: list[str]) -> list[str]:
    """Names that any rank has found: each may hold a share of the weights."""
    return list(dict.fromkeys(name for found in every_rank(names) for name in found))


def not_finite(tensors: Mapping[str, Any]) -> list[str]:
    """Names of tensors that hold NaN or infinity; waits for the device once."""
    shares = {name: local(value) for name, value in tensors.items() if isinstance(value, Tensor)}
    floats = {n: v for n, v in shares.items() if v.is_floating_point() and v.numel()}
    if not floats:
        return []
    device = next(iter(floats.values())).device
    flags = torch.stack([value.isfinite().all().to(device, non_blocking=True) for value in floats.values()])
    return [name for name, finite in zip(floats, flags.tolist(), strict=True) if not finite]
