"""The time between the visits of a pair: with its sign, as a weight, and whether any is known."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from lssl.utils.errors import InputError

__all__ = ["interval_weight", "require_intervals", "require_order", "signed_interval"]


def interval_weight(first_time: Tensor, second_time: Tensor, tau: float) -> Tensor:
    """``exp(-|Δt| / τ)`` of each pair: 1 for one visit shown twice, about 0.37 after τ years.

    A pair of unknown interval (NaN) has weight 0, because nothing says how close its visits are.

    The weights are not normalised here. The two users differ, for a reason:

    * Contrastive terms divide by the sum of the weights (:func:`lssl.utils.distributed.weighted_mean`). Each pair is
      compared with others of the batch, so the weights say which pairs matter more. The scale of the loss must not
      depend on which intervals a batch happens to hold.
    * The consistency of segmentations divides by the number of pairs (:class:`lssl.losses.Consistency`). It is added to
      a supervised loss, and a batch of far-apart visits gives little evidence that two maps should agree. Its share of
      the total loss must shrink then; dividing by the sum would restore it.

    Args:
        first_time: ``(B,)`` years since the subject's first visit, as ``View.time``; NaN where unknown.
        second_time: ``(B,)`` the same of the other visit.
        tau: years τ, above 0.

    Returns:
        ``(B,)`` float32 weights from 0 to 1.
    """
    return torch.exp(-(second_time - first_time).abs().float() / tau).nan_to_num(0.0)


def require_intervals(visits: pd.DataFrame) -> None:
    """Refuses to weigh pairs by their interval where no interval is known: all of them would count 0.

    Args:
        visits: the table, with ``subject`` and ``time`` (years, NaN where unknown).
    """
    several = visits[visits.groupby("subject")["time"].transform("size") > 1]
    if len(several) and not (several.groupby("subject")["time"].count() > 1).any():
        raise InputError(
            "interval weighs pairs by the years between their visits, but of no subject are two visits known in time; "
            "give dates, ages or days (see docs/times.md), or set interval to null."
        )


def signed_interval(first_time: Tensor, second_time: Tensor) -> tuple[Tensor, Tensor]:
    """Years from the first visit to the second, and which pairs have an order.

    Args:
        first_time: ``(B,)`` years since the subject's first visit, as ``View.time``; NaN where unknown.
        second_time: ``(B,)`` the same of the other visit.

    Returns:
        ``(B,)`` float32 years, negative if the second visit is the earlier one, 0 where unknown; and ``(B,)`` float32,
        1 where they are known and differ, else 0.
    """
    years = (second_time - first_time).float().nan_to_num(0.0)
    return years, years.ne(0).float()


def require_order(visits: pd.DataFrame, name: str) -> None:
    """Refuses data from which no order of visits can be learned.

    Args:
        visits: the table, with ``subject`` and ``time`` (years, NaN where unknown).
        name: of the strategy, for the message.
    """
    if not (visits.groupby("subject")["time"].nunique() > 1).any():
        raise InputError(
            f"{name} learns from the years between visits, but of no subject are two visits known at different times; "
            "give dates, ages or days (see docs/times.md), or take a strategy that needs no time."
        )
