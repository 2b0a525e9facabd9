"""Agreement of the segmentations of two visits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lssl.utils.errors import InputError

__all__ = ["Consistency"]


class Consistency(nn.Module):
    """One visit's prediction should be what the other visit's says, where both show the same place.

    For a sample with predictions p and targets q (of the other visit, on the same voxels, without gradient),
    ``L = mean_c [1 - (2 Σ p_c q_c + ε) / (Σ p_c + Σ q_c + ε)]``, ε = 1e-5, sums over its valid voxels, c over all
    classes, background included. ``targets = "hard"`` takes the other's most probable class as 0 and 1, as published
    (Ren et al., NeurIPS 2022). ``"soft"`` takes its probabilities, with ``Σ p² + Σ q²`` below the fraction: with plain
    sums it would be less than its best for equal predictions, and push them towards 0 and 1.

    The published loss penalises true change between the visits as well; ``threshold``, and the weights that the caller
    gives to samples, are there for that. Constant predictions have loss 0: it is of use beside a supervised term only.

    Paper: https://arxiv.org/abs/2206.04281. Reference code:
    https://github.com/mengweiren/longitudinal-representation-learning.

    Args:
        targets: ``hard`` or ``soft``.
        threshold: voxels count where the target's largest probability is at least this; published: 0.
        absent: also average over classes that the target shows nowhere, as published. There the loss is near 1
            whatever small probability is predicted, and near 0 only for none.

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
            target: ``(B, K, D, H, W)`` probabilities of the other visit at the same places.
            valid: ``(B, D, H, W)`` bool, the voxels that both show.
            weight: ``(B,)``; not normalised, so that a batch of far-off visits counts less. ``None``: 1.
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
