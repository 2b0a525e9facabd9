"""Dice and cross-entropy for label maps with gaps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DiceCE"]


class DiceCE(nn.Module):
    """MONAI's Dice loss plus cross-entropy, over the voxels that have a label.

    ``L = mean_c [1 - (2 Σ p_c y_c + ε) / (Σ p_c + Σ y_c + ε)] + Σ w_y (-log p_y) / Σ w_y`` with p the soft-max of the
    logits, y the labels as 0 and 1, c over the classes but the background (0), ε = 1e-5, and sums over voxels *and*
    samples (batch Dice: a class that a crop does not show is judged where another shows it). Where every voxel has a
    label and w = 1 it is ``monai.losses.DiceCELoss(include_background=False, batch=True)``. The weights w act on the
    cross-entropy alone, while MONAI's act on both. Soft-max and sums are float32.

    Args:
        weight: ``(K,)`` w of each class, background first; ``None`` weighs all alike.

    Example:
        >>> import torch
        >>> target = torch.tensor([0, 1, 1, -1]).view(1, 4, 1, 1)
        >>> logits = 50 * torch.eye(2)[target.clamp_min(0)].movedim(-1, 1)
        >>> round(DiceCE()(logits, target).item(), 4)
        0.0
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None) -> None:
        super().__init__()
        from monai.losses import DiceLoss

        self.register_buffer("weight", weight)
        self.dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            logits: ``(B, K, D, H, W)``.
            target: ``(B, D, H, W)`` classes, -1 where there is no label. Without any label the loss is 0.
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits, known = logits.float(), target >= 0
            total = F.cross_entropy(logits, target, self.weight, ignore_index=-1, reduction="sum")
            each = known.float() if self.weight is None else self.weight[target.clamp_min(0)] * known
            entropy = total / each.sum().clamp_min(1e-8)
            # A voxel without a label becomes certain background in both, which is no class of the Dice: it adds 0.
            background = torch.full_like(logits, -1e4)
            background[:, 0] = 1e4
            logits = torch.where(known[:, None], logits, background)
            return self.dice(logits, target.clamp_min(0)[:, None]) + entropy
