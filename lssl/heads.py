"""Heads: small multi-layer perceptrons on feature vectors, used in pretraining and then thrown away."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from lssl.errors import InputError

__all__ = ["Projector"]


class Projector(nn.Sequential):
    """Multi-layer perceptron on rows ``(N, in_features) → (N, out_features)``; projectors and predictors alike.

    ``layers - 1`` times Linear, norm, ReLU, then a Linear; a Linear before a norm has no bias.

    Args:
        in_features: channels of the tap.
        hidden: width of the hidden layers.
        out_features: width of the output.
        layers: number of Linear layers.
        norm: ``batch`` (over all rows: samples and voxels), ``layer`` (safe for very few rows), or ``none``.
        last_norm: also normalise the output, without learned scale and shift (as SimSiam's projector does).
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
            raise InputError(
                f"The heads' batch normalisation needs at least {self.FEWEST_ROWS} rows and got {len(rows)} "
                "(samples × views × voxels of the tap): use a larger batch or larger views."
            )
        return super().forward(rows)


def _norm(kind: str, width: int, affine: bool = True) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm1d(width, affine=affine)
    if kind == "layer":
        return nn.LayerNorm(width, elementwise_affine=affine)
    return nn.Identity()
