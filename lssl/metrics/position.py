"""How well features predict their position in the crop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["PositionR2"]


class PositionR2(Metric):
    """R² of a ridge regression from features to their coordinates in the crop, fitted on one half, tested on the other.

    Near 1 on *noise* images the network reads its position off its own padding: a dense objective on views cut at the
    same window is then solved without looking at the anatomy. On images a high value may also come from anatomy, whose
    place in a crop is not random. 0 for features that know nothing (or below, where the fit does not carry over).

    Args:
        channels: number of channels.
        ridge: penalty on standardised features, as a share of the number of rows.
        **kwargs: see :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    higher_is_better = False
    moments: Tensor
    crops: Tensor

    def __init__(self, channels: int, ridge: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channels, self.ridge = channels, ridge
        size = channels + 4  # features, three coordinates, and a one
        # float64 moments of the fitting and the testing half
        self.add_state("moments", torch.zeros(2, size, size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("crops", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, features: Tensor, coordinates: Tensor, crop: int | None = None) -> None:
        """Adds one crop, to either half in turn, so that no crop serves both.

        Args:
            features: ``(N, C)``.
            coordinates: ``(N, 3)`` coordinates in the crop, in any unit.
            crop: its number, even or odd; ``None`` counts them. Processes that share crops must say it.
        """
        rows = torch.cat(
            [features.double(), coordinates.double(), torch.ones_like(coordinates[:, :1], dtype=torch.float64)], 1
        )
        self.moments[(self.crops if crop is None else crop) % 2] += rows.T @ rows
        self.crops += 1

    def compute(self) -> Tensor:
        """Mean R² over the three axes."""
        c = self.channels
        fit, test = (moments / moments[-1, -1] for moments in self.moments)
        mean, place = fit[:c, -1], fit[c:-1, -1]
        scale = (fit.diagonal()[:c] - mean.square()).clamp_min(1e-12).sqrt()
        covariance = (fit[:c, :c] - torch.outer(mean, mean)) / torch.outer(scale, scale)
        cross = (fit[:c, c:-1] - torch.outer(mean, place)) / scale[:, None]
        identity = torch.eye(c, dtype=torch.float64, device=fit.device)
        slope = torch.linalg.solve(covariance + self.ridge * identity, cross) / scale[:, None]
        # residual = y - slope·x - offset, as a linear form of a row (x, y, 1); its mean square follows from the moments
        offset = place - slope.T @ mean
        form = torch.cat([-slope, torch.eye(3, dtype=torch.float64, device=fit.device), -offset[None]])
        residual = torch.einsum("ak,ab,bk->k", form, test, form)
        variance = test.diagonal()[c:-1] - test[c:-1, -1].square()
        return (1 - residual / variance).mean().float()
