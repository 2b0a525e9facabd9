"""How wrong the rates are at which volumes change."""

from __future__ import annotations

import torch
from torch import Tensor

from lssl.metrics.per_structure import PerStructure
from lssl.utils.errors import InputError

__all__ = ["TrajectoryError"]


class TrajectoryError(PerStructure):
    """Mean over subjects of ``|predicted rate - true rate|`` of each structure's volume, in % per year.

    A rate is ``100 b / mean(V)`` with b the least-squares slope of the volumes V over time, that is, Reuter's
    symmetrised rate (NeuroImage 2012) for two visits and its natural extension to more. Each course is divided by its
    own mean, so a volume that is always, say, 10 % too large costs nothing: the Dice tells that. The difference is
    taken per subject, so errors of opposite sign do not cancel, as they would in a difference of mean rates.

    A constant prediction, or a copy of one visit's for all, has the rate 0 and scores the mean of the true rates'
    magnitudes: what does better than that has seen change. A structure that is predicted in no visit has the rate 0
    too. Visits whose time or true volume is unknown (NaN), subjects with fewer than two different times left and
    structures that a subject truly lacks are left out; a NaN prediction gives NaN.

    Args:
        structures: number K of structures.
        **kwargs: see :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> error = TrajectoryError(2)
        >>> truth = torch.tensor([[98.0, 50.0], [102.0, 50.0]])
        >>> error.update(torch.full((2, 2), 100.0), truth, torch.tensor([0.0, 2.0]))
        >>> error.compute().tolist()
        [2.0, 0.0]
    """

    higher_is_better = False

    def update(self, predicted: Tensor, truth: Tensor, times: Tensor) -> None:
        """Adds one subject, all of its visits at once, in any order.

        Args:
            predicted: ``(V, K)`` volumes of its V visits, in mm³ (or any one unit).
            truth: ``(V, K)`` the true ones.
            times: ``(V,)`` years since any fixed day of the subject, NaN where unknown.
        """
        if not predicted.shape == truth.shape == (len(times), *truth.shape[1:]):
            raise InputError(
                f"Volumes of {tuple(predicted.shape)} and {tuple(truth.shape)} (visits, structures) do not fit to "
                f"{len(times)} times; give one subject's visits."
            )
        known = truth.isfinite() & times.isfinite()[:, None]
        true = _yearly_rates(truth, times, known)
        error = (_yearly_rates(predicted, times, known) - true).abs()
        counted = true.isfinite() & (truth.where(known, 0) > 0).any(0)
        self.add(error[None], counted[None])


def _yearly_rates(volumes: Tensor, times: Tensor, known: Tensor) -> Tensor:
    """``(K,)`` least-squares slope over the mean, in % per year.

    0 where all volumes are 0, NaN with fewer than two different times.

    Args:
        volumes: ``(V, K)``.
        times: ``(V,)`` years since any fixed day of the subject, NaN where unknown.
        known: ``(V, K)`` bool, the visits that count for each structure.
    """
    count = known.sum(0).clamp_min(1)
    values, years = volumes.double().where(known, 0), times.double()[:, None].where(known, 0)
    mean = values.sum(0) / count
    centred = (years - years.sum(0) / count).where(known, 0)
    spread = centred.square().sum(0)
    slope = (centred * values).sum(0) / spread
    rate = torch.where(mean == 0, 0, 100 * slope / mean)
    return rate.where(spread > 0, torch.nan)
