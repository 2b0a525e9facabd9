"""Temporal order: which of two visits came first, and how many years lie between them.

Kim, Sabuncu: "Learning to Compare Longitudinal Images" (PaIRNet), MIDL 2023 (PMLR 227), and Kim, Karaman, Zhao, Wang,
Sabuncu: "Learning-based inference of longitudinal image changes" (LILAC), PNAS 2025 (doi 10.1073/pnas.2411492122). One
network sees both visits; features are subtracted, and a layer without bias gives the signed answer. Only the abstracts
were available. They state this, and that the order is the self-supervised task. The head, the pooling and the
uncertainty are chosen here.

The features of one tap are pooled (mean and maximum) to one vector per view, from which a small network h computes
three numbers, (s, m, u). For views 1 and 2 and the signed interval Δt = t₂ - t₁ in years:

======== ======================================================================================= ======
term     formula                                                                                 weight
======== ======================================================================================= ======
order    log(1 + exp(-sign(Δt) S)), S = s₂ - s₁                                                  1
interval abs(Δt - M) / b + log 2b, M = m₂ - m₁, b = 0.05 + log(1 + exp(u₁ + u₂)), in years       1
======== ======================================================================================= ======

* *order* is the logistic loss: S is the log odds that visit 2 is the later one. Guessing has log 2 ≈ 0.69.
* *interval* is the negative log likelihood of a Laplace distribution with centre M and scale b, so the network says how
  uncertain it is. The expected absolute error is b. The least b, 18 days, bounds the loss from below.

S and M change their sign and b stays the same if the visits change places. So no network can learn that "the second one
is later". The visits are also presented in random order, because views of first and second visits are cut differently
(:func:`lssl.data.pair_order.in_random_order`). A pair whose times are equal or unknown has no order: it is left out of
both terms, and the log gives the share of such pairs (``skipped``).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lssl.data.batch import PairBatch
from lssl.networks.backbone import Backbone
from lssl.networks.heads import Projector, mean_and_max
from lssl.timed_strategy import TimedStrategy
from lssl.utils.distributed import weighted_mean
from lssl.utils.errors import positive
from lssl.utils.intervals import signed_interval
from lssl.views.sampler import View

__all__ = ["Comparison", "TemporalOrder"]


class Comparison(NamedTuple):
    """Two visits compared, ``(B,)`` float32 each.

    Attributes:
        order: log odds that the second visit is the later one.
        years: estimated years from the first visit to the second, negative if the second is the earlier one.
        scale: expected absolute error of ``years``.
    """

    order: Tensor
    years: Tensor
    scale: Tensor


class TemporalOrder(TimedStrategy):
    """Which of two visits came first, and how many years lie between them (PaIRNet, LILAC; Kim et al., 2023, 2025).

    Args:
        backbone: network and taps.
        tap: feature map that is pooled; one of the encoder, so that the decoder does not run.
        hidden: width of the head's hidden layer.
        norm: normalisation in the head.
        **common: see :class:`lssl.task.Task`.
    """

    LOSS_WEIGHTS: ClassVar = {"order": 1.0, "interval": 1.0}
    #: Least scale in years. Intervals are rounded to days at best, and a loss without a floor has no lower bound.
    LEAST_SCALE: ClassVar = 0.05

    def __init__(
        self,
        backbone: Backbone,
        tap: str = "bottleneck",
        hidden: int = 256,
        norm: Literal["batch", "layer", "none"] = "none",
        **common: Any,
    ) -> None:
        super().__init__(backbone, **common)
        positive(hidden=hidden)
        backbone.freeze_unused([tap])
        self.tap = tap
        self.head = Projector(2 * backbone.taps[tap].channels, hidden, 3, norm=norm)

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """See the module's table."""
        years, ordered = signed_interval(first.time, second.time)
        found = self.compare(first.image, second.image)
        self.log_metric("skipped", 1 - ordered.mean())
        terms = {}
        if self.uses("order"):
            terms["order"] = weighted_mean(F.softplus(-years.sign() * found.order), ordered)
        if self.uses("interval"):
            likelihood = (years - found.years).abs() / found.scale + (2 * found.scale).log()
            terms["interval"] = weighted_mean(likelihood, ordered)
        return terms

    def compare(self, first: Tensor, second: Tensor) -> Comparison:
        """Compares images ``(B, C, D, H, W)`` of two visits."""
        pooled = mean_and_max(self.backbone(torch.cat([first, second]), [self.tap])[self.tap])
        with torch.autocast(pooled.device.type, enabled=False):  # small differences of large numbers
            one, two = self.head(pooled).chunk(2)
        order, years, _ = (two - one).unbind(1)
        return Comparison(order, years, self.LEAST_SCALE + F.softplus(one[:, 2] + two[:, 2]))
