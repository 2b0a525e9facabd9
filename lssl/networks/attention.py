"""Attention: of features of a masked crop to the full crop (Alice, Jiang et al., ICCV 2023), and of decoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Alignment", "ConditionalAttention", "DecoderLayer", "attend"]


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """``softmax(q kᵀ / √d) v`` in several heads: ``(B, K, width)`` of ``(B, K, width)`` and ``(B, N, width)``."""
    q, k, v = (rows.unflatten(2, (heads, -1)).transpose(1, 2) for rows in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


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
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.zeta = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.last = last

    def forward(self, query: Tensor, rows: Tensor) -> Tensor:
        """Attends from queries ``(B, K, width)`` to ``rows (B, N, width)``; gives ``(B, K, outputs of last)``."""
        key, value = self.key_value(rows).chunk(2, 2)
        found = self.out(attend(query, key, value, self.heads))
        return self.last(self.zeta(query + found if self.residual else found))


class DecoderLayer(nn.TransformerDecoderLayer):
    """torch's layer with norms first, GELU and no dropout, in 16 operations; as it is for masks, torch takes 24.

    Args:
        width: channels of rows and memory.
        heads: number of attention heads.

    Example:
        >>> import torch
        >>> DecoderLayer(8, heads=2)(torch.rand(2, 3, 8), torch.rand(2, 5, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)

    def forward(self, rows: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        """``(B, K, width)`` rows that attend to themselves, then to ``memory (B, N, width)``."""
        own = self.norm1(rows)
        rows = rows + self._attended(self.self_attn, own, own)
        rows = rows + self._attended(self.multihead_attn, self.norm2(rows), memory)
        return rows + self.linear2(F.gelu(self.linear1(self.norm3(rows))))

    @staticmethod
    def _attended(attention: nn.MultiheadAttention, query: Tensor, rows: Tensor) -> Tensor:
        weight, bias, width = attention.in_proj_weight, attention.in_proj_bias, attention.embed_dim
        if query is rows:
            q, k, v = F.linear(rows, weight, bias).chunk(3, 2)
        else:
            q = F.linear(query, weight[:width], bias[:width])
            k, v = F.linear(rows, weight[width:], bias[width:]).chunk(2, 2)
        return attention.out_proj(attend(q, k, v, attention.num_heads))
