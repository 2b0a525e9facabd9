"""Dice and cross-entropy for partly labelled maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.utils.distributed import gather, weighted_mean

__all__ = ["DiceCE"]


class DiceCE(nn.Module):
    """MONAI's Dice loss plus cross-entropy, over the voxels that have a label.

    ``L = mean_c [1 - (2 Σ p_c y_c + ε) / (Σ p_c + Σ y_c + ε)] + Σ w_y (-log p_y) / Σ w_y`` with p the soft-max of the
    logits, y the one-hot labels, c over all classes except the background (0), and ε = 1e-5. Sums run over voxels *and*
    samples of all ranks (batch Dice: a class missing from one crop is scored on the others). If every voxel has a label
    and w = 1, one rank computes ``monai.losses.DiceCELoss(include_background=False, batch=True)``. The weights w act on
    the cross-entropy alone; MONAI's act on both. Soft-max and sums are float32.

    Paper: https://arxiv.org/abs/1606.04797. Reference code: https://github.com/Project-MONAI/MONAI.

    Args:
        weight: ``(K,)`` weight w of each class, background first; ``None`` weighs all alike.

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
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            logits: ``(B, K, D, H, W)``.
            target: ``(B, D, H, W)`` classes, -1 for voxels without a label. Without any label the loss is 0.
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits, known = logits.float(), target >= 0
            total = F.cross_entropy(logits, target, self.weight, ignore_index=-1, reduction="sum")
            each = known.float() if self.weight is None else self.weight[target.clamp_min(0)] * known
            counted = each.sum()
            entropy = weighted_mean((total / counted.clamp_min(1e-8))[None], counted[None])
            return self._dice(logits.softmax(1)[:, 1:] * known[:, None], target) + entropy

    @staticmethod
    def _dice(p: Tensor, target: Tensor) -> Tensor:
        """Dice loss without the background; ranks exchange three sums per class."""
        y = target[:, None] == torch.arange(1, p.shape[1] + 1, device=p.device)[:, None, None, None]
        sums = torch.stack([volume.sum((0, 2, 3, 4)) for volume in (p * y, p, y.to(p.dtype))])
        both, predicted, true = gather(sums[None]).sum(0)
        return (1 - (2 * both + 1e-5) / (predicted + true + 1e-5)).mean()
