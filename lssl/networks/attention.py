"""Conditional attention: features of a masked crop ask features of the full crop (Alice, Jiang et al., ICCV 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Alignment", "ConditionalAttention"]


@dataclass
class Alignment:
    """Options of the conditional attention.

    Attributes:
        condition: features that the queries are made of: the ``visible`` share, which is masked least, or ``all``.
        residual: adds the query to the attention's output, as Alice's code does.
        heads: number of attention heads.
    """

    condition: Literal["visible", "all"] = "visible"
    residual: bool = False
    heads: int = 8


class ConditionalAttention(nn.Module):
    """``ζ(softmax(q (W_k x)ᵀ / √d) W_v x)`` in several heads; ζ is a linear map, an MLP and the last layer.

    Paper: https://arxiv.org/abs/2302.05615. Reference code: https://github.com/alibaba-damo-academy/alice.

    Args:
        width: channels of q, of x and of the attention; the number of heads divides it.
        heads: number of attention heads.
        last: layer after ζ's MLP.
        residual: adds q to the attention's output.

    Example:
        >>> import torch
        >>> attention = ConditionalAttention(8, heads=2, last=nn.Identity())
        >>> attention(torch.rand(2, 3, 8), torch.rand(2, 5, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, width: int, heads: int, last: nn.Module, residual: bool = False) -> None:
        super().__init__()
        self.heads, self.residual = heads, residual
        self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.zeta = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.last = last

    def forward(self, query: Tensor, rows: Tensor) -> Tensor:
        """Attends from queries ``(B, K, width)`` to ``rows (B, N, width)``; gives ``(B, K, outputs of last)``."""
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (query, self.key(rows), self.value(rows)))
        found = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.last(self.zeta(query + found if self.residual else found))
