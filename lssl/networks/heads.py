"""Heads: small multi-layer perceptrons on feature vectors, used in pretraining only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.utils.errors import InputError

__all__ = [
    "Projector",
    "StackedHeads",
    "StackedLinear",
    "TapHeads",
    "feature_std",
    "mean_and_max",
    "rowwise",
    "to_rows",
    "voxelwise",
]


class Projector(nn.Sequential):
    """Multi-layer perceptron on rows ``(N, in_features) → (N, out_features)``, for projectors and predictors.

    It has ``layers - 1`` blocks of Linear, norm and ReLU, then a Linear. A Linear before a norm has no bias.

    Args:
        in_features: channels of the tap.
        hidden: width of the hidden layers.
        out_features: width of the output.
        layers: number of Linear layers.
        norm: ``batch`` (over all rows: samples and voxels), ``layer`` (works with very few rows), or ``none``.
        last_norm: also normalise the output, without learned scale and shift, as in SimSiam's projector.
    """

    FEWEST_ROWS = 4

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        layers: int = 2,
        norm: Literal["batch", "layer", "none"] = "batch",
        last_norm: bool = False,
    ) -> None:
        modules: list[nn.Module] = []
        widths = [in_features] + [hidden] * (layers - 1)
        for width in widths[:-1]:
            modules += [nn.Linear(width, hidden, bias=norm == "none"), _norm(norm, hidden), nn.ReLU(inplace=True)]
        modules.append(nn.Linear(widths[-1], out_features, bias=not last_norm))
        if last_norm:
            modules.append(_norm(norm, out_features, affine=False))
        super().__init__(*modules)
        self.norm = norm

    def forward(self, rows: Tensor) -> Tensor:
        """``(N, in_features) → (N, out_features)``."""
        if self.training and self.norm == "batch" and len(rows) < self.FEWEST_ROWS:
            raise InputError(_few_rows(len(rows)))
        return super().forward(rows)


class TapHeads(nn.Module):
    """One head on rows per tap (or per other name).

    Args:
        heads: tap → head.

    Example:
        >>> heads = TapHeads({"decoder.1": Projector(16, 32, 8)})
        >>> heads.maps("decoder.1", torch.rand(2, 16, 4, 4, 4)).shape
        torch.Size([2, 8, 4, 4, 4])
        >>> heads.rows("decoder.1", torch.rand(2, 5, 16)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.taps = tuple(heads)
        self.heads = nn.ModuleDict({_key(tap): head for tap, head in heads.items()})

    def __contains__(self, tap: str) -> bool:
        return tap in self.taps

    def __len__(self) -> int:
        return len(self.taps)

    def __getitem__(self, tap: str) -> nn.Module:
        return self.heads[_key(tap)]

    def rows(self, tap: str, vectors: Tensor) -> Tensor:
        """Applies the tap's head to ``(B, K, C)``; gives ``(B, K, D)``. Statistics pool over samples and rows."""
        return rowwise(self[tap], vectors)

    def maps(self, tap: str, features: Tensor) -> Tensor:
        """Applies the tap's head to every voxel of ``(B, C, ...)``; gives ``(B, D, ...)``."""
        return voxelwise(self[tap], features)


class StackedLinear(nn.Module):
    """T linear layers of one size, as one batched product of ``(T, N, in_features)``; initial weights as torch's.

    Attributes:
        weight: ``(T, in_features, out_features)``.
        bias: ``(T · out_features,)``, flat, so that weight decay leaves it out; ``None`` without.
    """

    def __init__(self, count: int, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.count, bound = count, in_features**-0.5
        self.weight = nn.Parameter(torch.empty(count, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count * out_features).uniform_(-bound, bound)) if bias else None

    def forward(self, rows: Tensor) -> Tensor:
        """``(T, N, in_features) → (T, N, out_features)``."""
        if self.bias is None:
            return torch.bmm(rows, self.weight)
        return torch.baddbmm(self.bias.view(self.count, 1, -1), rows, self.weight)


class StackedHeads(nn.Module):
    """One :class:`Projector` with batch norm per tap, computed together: the taps' rows are equally many.

    Only the first layer may differ in width between the taps. A batch norm over all their channels is one per tap.

    Args:
        channels: tap → channels of its rows.
        hidden: width of the hidden layers.
        out_features: width of the output.
        layers: number of Linear layers.
        last_norm: see :class:`Projector`.

    Example:
        >>> heads = StackedHeads({"encoder.1": 16, "decoder.1": 24}, 32, 8)
        >>> heads([torch.rand(5, 16), torch.rand(5, 24)]).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self, channels: Mapping[str, int], hidden: int, out_features: int, layers: int = 2, last_norm: bool = False
    ) -> None:
        super().__init__()
        self.taps, count = tuple(channels), len(channels)
        out = hidden if layers > 1 else out_features
        free = layers == 1 and not last_norm
        widths = set(channels.values())
        self.first: nn.Module
        if len(widths) == 1:
            self.first = StackedLinear(count, widths.pop(), out, bias=free)
        else:
            self.first = nn.ModuleDict({_key(tap): nn.Linear(n, out, bias=free) for tap, n in channels.items()})
        rest: list[nn.Module] = []
        for layer in range(1, layers):
            rest += [StackedNorm(count * hidden), nn.ReLU(inplace=True)]
            last = layer == layers - 1
            rest.append(StackedLinear(count, hidden, out_features if last else hidden, bias=last and not last_norm))
        if last_norm:
            rest.append(StackedNorm(count * out_features, affine=False))
        self.rest = nn.Sequential(*(rest if count else []))

    def __contains__(self, tap: str) -> bool:
        return tap in self.taps

    def __len__(self) -> int:
        return len(self.taps)

    def forward(self, rows: Sequence[Tensor] | Tensor) -> Tensor:
        """Rows of all taps to ``(T, N, out_features)``.

        Args:
            rows: ``(..., channels)`` of each tap, in order, N in all, or ``(T, N, channels)``.
        """
        number = rows[0].shape[:-1].numel()
        if self.training and number < Projector.FEWEST_ROWS:
            raise InputError(_few_rows(number))
        if isinstance(rows, Tensor):
            return self.rest(self.first(rows))
        if not isinstance(self.first, nn.ModuleDict):
            return self.rest(self.first(torch.stack(list(rows)).flatten(1, -2)))
        columns = torch.cat(list(rows), -1).flatten(0, -2)  # one copy, whatever the layout of a tap's rows
        each = columns.split([values.shape[-1] for values in rows], 1)
        first = [self.first[_key(tap)](values) for tap, values in zip(self.taps, each, strict=True)]
        return self.rest(torch.stack(first, 1).transpose(0, 1))


class RowNorm(nn.BatchNorm1d):
    """Batch norm of rows ``(N, D)`` that does not count its batches: no momentum here depends on them."""

    def forward(self, rows: Tensor) -> Tensor:
        """See the class."""
        statistics = self.running_mean, self.running_var
        return F.batch_norm(rows, *statistics, self.weight, self.bias, self.training, self.momentum or 0.0, self.eps)


class StackedNorm(nn.Module):
    """Batch norm of the channels of T heads, ``(T, N, D) → (T, N, D)``; statistics run over the N rows of each."""

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.norm = RowNorm(channels, affine=affine)

    def forward(self, rows: Tensor) -> Tensor:
        """See the class."""
        return self.norm(rows.transpose(0, 1).flatten(1)).unflatten(1, (len(rows), -1)).transpose(0, 1)


def _few_rows(rows: int) -> str:
    return (
        f"The heads' batch normalisation needs at least {Projector.FEWEST_ROWS} rows and got {rows} "
        "(samples × views × voxels of the tap): use a larger batch or larger views."
    )


def _key(tap: str) -> str:
    """A valid submodule name: without dots, and different from every method's name."""
    return "tap_" + tap.replace(".", "/")


def to_rows(maps: Tensor) -> Tensor:
    """``(B, C, ...)`` as ``(B, N, C)``."""
    return maps.flatten(2).transpose(1, 2)


def rowwise(head: nn.Module, rows: Tensor) -> Tensor:
    """Applies a head to rows ``(B, K, C)``; gives ``(B, K, D)``."""
    return head(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])


def voxelwise(head: nn.Module, features: Tensor) -> Tensor:
    """Applies a head on rows to every voxel of ``(B, C, D, H, W)``, as 1×1×1 convolutions would."""
    return rowwise(head, to_rows(features)).transpose(1, 2).unflatten(2, features.shape[2:])


def mean_and_max(features: Tensor, weight: Tensor | None = None) -> Tensor:
    """``(B, 2 C)`` float32: mean and maximum of each channel of ``(B, C, D, H, W)``.

    The mean alone is useless after an instance norm, which makes it the same for every image.

    Args:
        features: features of a tap.
        weight: ``(B, 1, D, H, W)`` weight of each voxel in the mean. The maximum runs over voxels with at least half
            the largest weight.
    """
    rows = features.float().flatten(2)
    if weight is None:
        return torch.cat([rows.mean(2), rows.amax(2)], 1)
    weight = weight.flatten(2) + 1e-6
    outside = weight < 0.5 * weight.amax(2, keepdim=True)
    return torch.cat([(rows * weight).sum(2) / weight.sum(2), rows.masked_fill(outside, float("-inf")).amax(2)], 1)


def feature_std(rows: Tensor) -> Tensor:
    """Standard deviation of L2-normalised rows ``(..., N, D)``, times √D: 1 if they fill the sphere, 0 if equal.

    Sets of rows, at further leading indices, are averaged.
    """
    rows = F.normalize(rows.detach().float(), dim=-1)
    return rows.std(-2, unbiased=False).mean() * rows.shape[-1] ** 0.5


def _norm(kind: str, width: int, affine: bool = True) -> nn.Module:
    if kind == "batch":
        return RowNorm(width, affine=affine)
    if kind == "layer":
        return nn.LayerNorm(width, elementwise_affine=affine)
    return nn.Identity()
