"""Voxel-wise InfoNCE between two views of known correspondence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.utils.distributed import weighted_mean
from lssl.utils.errors import positive

__all__ = ["DenseInfoNCE"]


class DenseInfoNCE(nn.Module):
    """Discriminates each point's counterpart in the other view from points more than ``exclusion`` mm away.

    ``L₁ = -log e^{q_i·k_i/τ} / (e^{q_i·k_i/τ} + Σ_{j: |x_i - x_j| > r} e^{q_i·k_j/τ})`` with q the L2-normalised
    projections of view 1, k those of view 2, and x the points in mm. ``L₂`` swaps the views, and the loss is
    ``½ (L₁ + L₂)``. Nearer points are neither positive nor negative: their logit is -∞. (van den Oord et al., 2018; per
    voxel as in Chaitanya et al., NeurIPS 2020.)

    Papers: https://arxiv.org/abs/1807.03748 and https://arxiv.org/abs/2006.10511. Reference code:
    https://github.com/krishnabits001/domain_specific_cl.

    Args:
        temperature: τ.
        exclusion: r in mm.

    Example:
        >>> import torch
        >>> points_mm = torch.tensor([[[0.0, 0, 0], [50.0, 0, 0]]])
        >>> z = torch.eye(2)[None]
        >>> DenseInfoNCE(temperature=0.1)(z, z, points_mm).item() < 1e-4
        True
    """

    def __init__(self, temperature: float = 0.1, exclusion: float = 8.0) -> None:
        super().__init__()
        positive(temperature=temperature)
        self.temperature, self.exclusion = temperature, exclusion

    def forward(self, z1: Tensor, z2: Tensor, points_mm: Tensor, weight: Tensor | None = None) -> Tensor:
        """Loss of projections ``(..., B, K, D)`` at K corresponding points, one for each leading index.

        Args:
            z1: projections of view 1.
            z2: projections of view 2.
            points_mm: ``(..., B, K, 3)`` points of the frame in mm.
            weight: ``(..., B)`` weight of each sample in the mean; 0 for a sample without corresponding points.
        """
        with torch.autocast(z1.device.type, enabled=False):
            z1, z2 = F.normalize(z1.float(), dim=-1), F.normalize(z2.float(), dim=-1)
            logits = z1 @ z2.mT / self.temperature
            distance = torch.cdist(points_mm, points_mm, compute_mode="donot_use_mm_for_euclid_dist")
            near = distance <= self.exclusion
            near.diagonal(dim1=-2, dim2=-1).fill_(False)  # itself: the positive
            logits = logits.masked_fill(near, float("-inf"))
            # The cross-entropy of rows, and of columns: log-sum-exp minus the diagonal
            both = logits.logsumexp(-1) + logits.logsumexp(-2) - 2 * logits.diagonal(dim1=-2, dim2=-1)
            return weighted_mean(0.5 * both.mean(-1), weight)
