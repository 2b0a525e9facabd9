"""Dice loss between the segmentations of two visits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lssl.utils.errors import InputError

__all__ = ["Consistency"]


class Consistency(nn.Module):
    """Penalises differences between the predictions of two visits at the same points.

    A sample has predictions p and targets q; q is the other visit's prediction on the same voxels, without gradient.
    ``L = mean_c [1 - (2 Σ p_c q_c + ε) / (Σ p_c + Σ q_c + ε)]``, ε = 1e-5. Sums run over the sample's valid voxels, c
    over all classes, background included.

    * ``targets = "hard"``: q is 1 for the other visit's most probable class and 0 elsewhere, as published (Ren et al.,
      NeurIPS 2022).
    * ``targets = "soft"``: q are the other visit's probabilities, and the denominator is ``Σ p² + Σ q² + ε``. With
      plain sums, equal predictions would not reach loss 0 and would be pushed towards 0 and 1.

    The published loss also penalises true change between the visits. ``threshold`` and the samples' weights reduce
    this. Constant predictions have loss 0, so use this loss beside a supervised term only.

    Paper: https://arxiv.org/abs/2206.04281. Reference code:
    https://github.com/mengweiren/longitudinal-representation-learning.

    Args:
        targets: ``hard`` or ``soft``.
        threshold: only voxels whose largest target probability is at least this count; published: 0.
        absent: also average over classes that are absent from the target, as published. For such a class the loss is
            near 1 for any small predicted probability, and near 0 only for none.

    Example:
        >>> import torch
        >>> p = torch.tensor([0.9, 0.1]).view(1, 2, 1, 1, 1).expand(1, 2, 2, 2, 2)
        >>> round(Consistency("soft")(p, p, torch.ones(1, 2, 2, 2, dtype=torch.bool)).item(), 6)
        0.0
    """

    def __init__(self, targets: Literal["hard", "soft"] = "hard", threshold: float = 0.0, absent: bool = True) -> None:
        super().__init__()
        if not 0 <= threshold < 1:
            raise InputError(f"threshold: give a probability of at least 0 and below 1, not {threshold}.")
        self.targets, self.threshold, self.absent = targets, threshold, absent

    def forward(self, prediction: Tensor, target: Tensor, valid: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean over samples of weight times loss.

        Args:
            prediction: ``(B, K, D, H, W)`` probabilities.
            target: ``(B, K, D, H, W)`` probabilities of the other visit at the same points.
            valid: ``(B, D, H, W)`` bool, true for voxels that both visits show.
            weight: ``(B,)`` weights, not normalised: a batch of far-apart visits counts less
                (:func:`lssl.utils.intervals.interval_weight` says why). ``None``: all 1.
        """
        with torch.autocast(prediction.device.type, enabled=False):
            p, q = prediction.float().flatten(2), target.detach().float().flatten(2)
            largest, best = q.max(1, keepdim=True)
            chosen = torch.zeros_like(q).scatter_(1, best, 1.0)
            counted = (valid.flatten(1)[:, None] & (largest >= self.threshold)).float()
            present = (chosen * counted).sum(2) > 0
            q = chosen if self.targets == "hard" else q
            power = 1 if self.targets == "hard" else 2
            below = (counted * (p**power + q**power)).sum(2)
            loss = 1 - (2 * (counted * p * q).sum(2) + 1e-5) / (below + 1e-5)
            share = torch.ones_like(loss) if self.absent else present.float()
            each = (loss * share).sum(1) / share.sum(1).clamp_min(1)
            return each.mean() if weight is None else (weight * each).mean()
