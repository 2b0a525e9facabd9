"""Readout: from pooled features of one visit, or of two and the years between them, to a few numbers.

With z the pooled features of a tap (mean and maximum over the foreground) and Δt > 0 the years between two visits, the
inputs are

====== ==========================================
visits inputs
====== ==========================================
one    z
pair   z₁, (z₂ - z₁) / max(Δt, ½), Δt
====== ==========================================

Each input is standardised by its mean and standard deviation over the training samples, measured once before the first
step: features of networks differ by orders of magnitude, and a rate of change is far smaller than what changes. Then
follows a linear layer, or one hidden layer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lssl.networks.heads import Projector
from lssl.utils.errors import InputError

__all__ = ["SHORTEST", "Readout", "pair_inputs"]

SHORTEST = 0.5  # years by which a change is divided at least: noise of a rescan is not a rate


def pair_inputs(first: Tensor, second: Tensor, years: Tensor) -> Tensor:
    """``(B, 2 F + 1)`` inputs of two visits.

    Args:
        first: ``(B, F)`` features of the first visit.
        second: ``(B, F)`` of the second one.
        years: ``(B,)`` from the first to the second, above 0.
    """
    rate = (second - first) / years.clamp_min(SHORTEST)[:, None]
    return torch.cat([first, rate, years[:, None]], 1)


class Readout(nn.Module):
    """Standardises inputs ``(B, F)`` and maps them to ``(B, K)``.

    Args:
        features: number F of inputs.
        outputs: number K.
        hidden: width of a hidden layer; 0: none, a linear readout.
        dropout: share of inputs of the last layer that a training step leaves out.
    """

    mean: Tensor
    scale: Tensor
    measured: Tensor

    def __init__(self, features: int, outputs: int, hidden: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        if hidden < 0 or not 0 <= dropout < 1:
            raise InputError(f"Give hidden 0 or more and dropout from 0 to below 1, not {hidden} and {dropout}.")
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("measured", torch.tensor(False))
        layers: list[nn.Module] = []
        if hidden:
            layers += [Projector(features, hidden, hidden, layers=1), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(hidden or features, outputs))
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)  # no sample is told from another before the first step
        nn.init.zeros_(last.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """``(B, F) → (B, K)``."""
        with torch.autocast(inputs.device.type, enabled=False):  # rates are small differences
            return self.layers((inputs.float() - self.mean) / self.scale)

    @torch.no_grad()
    def measure(self, rows: Iterable[Tensor]) -> None:
        """Takes mean and standard deviation of inputs ``(B, F)``; of a constant one, only the mean."""
        every = torch.cat(list(rows)).double()
        deviation = every.std(0, unbiased=False)
        varies = deviation > 1e-6 * every.abs().amax(0).clamp_min(1e-12)
        self.mean.copy_(every.mean(0))
        self.scale.copy_(torch.where(varies, deviation, 1.0))
        self.measured.fill_(True)
