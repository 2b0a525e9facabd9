"""How often a volume is seen to change in the wrong direction."""

from __future__ import annotations

import torch
from torch import Tensor

from lssl.metrics.per_structure import PerStructure

__all__ = ["ReversalRate"]


class ReversalRate(PerStructure):
    """Share of steps between consecutive visits at which a volume grows though it truly shrinks, or the reverse.

    The sign test of longitudinal consistency, our definition: for visit v and v + 1 of a subject, the share with
    ``(P_{v+1} - P_v)(T_{v+1} - T_v) < 0``, P predicted and T true, among steps with a true change. Between 0 and 1,
    about ½ for noise far above the change. Steps at which the truth stays the same or is unknown (NaN) are left
    out; a NaN prediction gives NaN.

    A constant prediction, or a copy of one visit's for all, never reverses: it scores 0, and so wins; put
    :class:`TrajectoryError` beside it, which such a prediction loses.

    Args:
        structures: number K of structures.
        **kwargs: see :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> reversal = ReversalRate(2)
        >>> reversal.update(torch.tensor([[5.0, 1], [6, 2], [4, 3]]), torch.tensor([[9.0, 1], [8, 5], [7, 9]]))
        >>> reversal.compute().tolist()
        [0.5, 0.0]
    """

    higher_is_better = False

    def update(self, predicted: Tensor, truth: Tensor) -> None:
        """Adds one subject, all of its visits at once.

        Args:
            predicted: ``(V, K)`` volumes of its V visits, in time order, in any unit.
            truth: ``(V, K)`` the true ones.
        """
        seen, true = predicted.double().diff(dim=0), truth.double().diff(dim=0)
        counted = true.isfinite() & (true != 0)
        against = (seen.sign() * true.sign() < 0).double().masked_fill(seen.isnan(), torch.nan)  # NaN has the sign 0
        self.add(against, counted)
