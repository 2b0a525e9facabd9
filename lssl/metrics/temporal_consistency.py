"""How well the segmentations of two visits agree."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lssl.metrics.per_structure import PerStructure
from lssl.utils.errors import InputError

__all__ = ["TemporalConsistency"]


class TemporalConsistency(PerStructure):
    """Dice ``2 |A ∩ B| / (|A| + |B|)`` between one visit's segmentation, brought onto the other visit, and the other's.

    The spatio-temporal consistency of segmentation (STCS) of Li et al., "Longitudinal diffusion MRI analysis using
    Segis-Net", NeuroImage 2021, in whose work a non-linear registration brings the segmentation over. Here that is the
    caller's: through a rigid frame the score falls with true change too, through the true deformation it need not. Per
    class, the mean over samples in which either segmentation has it: 1 for agreement, 0 where only one has it.

    A prediction that is constant, or copied from the other visit, scores 1, and so wins; put :class:`TrajectoryError`
    beside it, or the Dice against true labels, which such a prediction loses.

    Args:
        classes: number K of classes 0 to K - 1; class 0 is scored like the others.
        **kwargs: see :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, classes: int, **kwargs: Any) -> None:
        super().__init__(classes, **kwargs)
        self.classes = classes

    def update(self, brought: Tensor, other: Tensor) -> None:
        """Adds samples.

        Args:
            brought: ``(B, D, H, W)`` classes of one visit on the other's grid; -1 outside of it.
            other: ``(B, D, H, W)`` classes of the other visit; voxels that are -1 in either are ignored.
        """
        brought, other = brought.flatten(1).long(), other.flatten(1).long()
        if max(brought.max(), other.max()) >= self.classes:
            raise InputError(
                f"A segmentation holds class {max(brought.max(), other.max())}, but consistency was asked of classes "
                f"0 to {self.classes - 1}; raise the number of classes."
            )
        seen = (brought >= 0) & (other >= 0)
        both = self._sizes(brought, seen & (brought == other))
        sizes = self._sizes(brought, seen) + self._sizes(other, seen)
        present = sizes > 0
        self.add(2 * both / sizes, present)

    def _sizes(self, label: Tensor, chosen: Tensor) -> Tensor:
        """``(B, K)`` voxels of each class among the chosen ones."""
        sizes = torch.zeros(len(label), self.classes, dtype=torch.float64, device=label.device)
        return sizes.scatter_add_(1, label.clamp_min(0), chosen.double())
