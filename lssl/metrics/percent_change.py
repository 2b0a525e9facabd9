"""How much volumes differ between two visits."""

from __future__ import annotations

from torch import Tensor

from lssl.metrics.per_structure import PerStructure

__all__ = ["PercentChange"]


class PercentChange(PerStructure):
    """Absolute symmetrised percent change ``100 |V₂ - V₁| / (½ (V₁ + V₂))`` of each structure, in %.

    Reuter, Schmansky, Rosas, Fischl: "Within-subject template estimation for unbiased longitudinal image analysis",
    NeuroImage 2012. The mean over pairs of visits in which either visit has the structure: 0 for equal volumes, 200
    for a structure that only one visit has. Pairs in which both lack it, or a volume is NaN, are left out.

    Of two scans on one day it is the error of repetition, and less is better. Between visits years apart it holds the
    true change too: a constant prediction, or a copy of the other visit's, scores 0, and so wins; put
    :class:`TrajectoryError` beside it, which such a prediction loses.

    Args:
        structures: number K of structures.
        **kwargs: see :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> change = PercentChange(2)
        >>> change.update(torch.tensor([[900.0, 0.0]]), torch.tensor([[1100.0, 40.0]]))
        >>> change.compute().tolist()
        [20.0, 200.0]
    """

    higher_is_better = False

    def update(self, first: Tensor, second: Tensor) -> None:
        """Adds pairs of visits.

        Args:
            first: ``(B, K)`` volumes of the first visits, in mm³ (or any one unit).
            second: ``(B, K)`` of the second ones.
        """
        first, second = first.double(), second.double()
        both = first + second
        present = both > 0  # NaN neither
        change = 200 * (second - first).abs() / both
        self.add(change, present)
