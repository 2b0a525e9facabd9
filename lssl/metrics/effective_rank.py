"""Effective rank of features."""

from __future__ import annotations

import torch
from torch import Tensor

from lssl.metrics.moments import Moments

__all__ = ["EffectiveRank"]


class EffectiveRank(Moments):
    """``exp(-Σ p_i log p_i)``, ``p_i = σ_i / Σ σ``, with σ the singular values of the centred feature matrix.

    RankMe (Garrido et al., ICML 2023), on centred features, so that a common offset does not hide a collapse. Between
    1 and the number of channels; 1 or NaN for features on a line or a point. Kept as sums: constant memory.

    Args:
        channels: number of channels.
        **kwargs: see :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The effective rank; NaN for features that are not finite."""
        scatter = self.scatter()
        if not scatter.isfinite().all():  # a diverged network has none
            return torch.full((), float("nan"), device=scatter.device)
        values = torch.linalg.eigvalsh(scatter)
        sigma = values.clamp_min(values[-1] * 1e-12).sqrt()  # what rounding leaves of zero counts as zero
        p = sigma / sigma.sum()
        return torch.special.entr(p).sum().exp().float()
