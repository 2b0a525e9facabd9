"""Trajectory prediction: features of a later visit from an earlier visit and the years between them.

A method of the house, without a paper of its own. It is BYOL (Grill et al.: "Bootstrap your own latent", NeurIPS 2020,
arXiv 2006.07733) whose predictor is told the time. The features of one tap are pooled (mean and maximum) and projected
to z. For the earlier view 1 and the later view 2 of a pair, Δt ≥ 0 years apart:

========== ======================================================================================= ======
term       formula                                                                                 weight
========== ======================================================================================= ======
prediction 1 - cos(q(z₁, Δt, log(1 + Δt)), sg t₂); t₂ is a slow teacher's embedding of view 2, or  1
           z₂ itself without one (``momentum: null``, as in SimSiam)
========== ======================================================================================= ======

* The predictor and the stopped gradient keep features from becoming constant, as in BYOL; nothing in the loss forbids
  it. Watch ``feature_std`` in the log: 0 is collapse. The projector's output is normalised, as in SimSiam: without,
  all z drifted towards one vector in 120 steps on toy images.
* Features that never change are the easiest to predict. Where a change can be told from the earlier visit and the
  time, the predictor can follow it; what cannot be told is forgotten.
* Only the future is predicted. Which visit is the earlier one is read from the times, not from the order of the views,
  and visits are presented in random order (:func:`lssl.data.pair_order.in_random_order`), so that the predictor cannot
  learn how first and second views are cut.
* Δt = 0 (two views of one visit, or a rescan) is a pair as any other. A pair of unknown interval is left out, and the
  log gives the share of such pairs (``skipped``).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lssl.data.batch import PairBatch
from lssl.networks.backbone import Backbone
from lssl.networks.heads import Projector, feature_std, mean_and_max
from lssl.networks.teacher import Teacher
from lssl.timed_strategy import TimedStrategy
from lssl.utils.distributed import weighted_mean
from lssl.utils.errors import positive
from lssl.utils.intervals import signed_interval
from lssl.views.sampler import View

__all__ = ["TrajectoryPrediction"]


class TrajectoryPrediction(TimedStrategy):
    """Features of a later visit are predicted from an earlier one and the years between (BYOL told the time).

    Args:
        backbone: network and taps.
        tap: feature map that is pooled; one of the encoder, so that the decoder does not run.
        hidden: width of the heads' hidden layers (BYOL: 4096).
        projection: width of z (BYOL: 256).
        norm: normalisation in the heads: ``batch``, or ``layer`` for batches of fewer than 4 pairs.
        momentum: first momentum of the teacher (BYOL: 0.996); it rises to 1. ``None``: no teacher.
        **common: see :class:`lssl.task.Task`.
    """

    LOSS_WEIGHTS: ClassVar = {"prediction": 1.0}

    def __init__(
        self,
        backbone: Backbone,
        tap: str = "bottleneck",
        hidden: int = 512,
        projection: int = 128,
        norm: Literal["batch", "layer"] = "batch",
        momentum: float | None = 0.99,
        **common: Any,
    ) -> None:
        super().__init__(backbone, **common)
        positive(hidden=hidden, projection=projection)
        backbone.freeze_unused([tap])
        self.tap = tap
        self.projector = Projector(2 * backbone.taps[tap].channels, hidden, projection, norm=norm, last_norm=True)
        self.predictor = Projector(projection + 2, hidden, projection, norm=norm)
        if momentum is not None:
            self.teacher = Teacher({"backbone": backbone, "projector": self.projector}, momentum)

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """See the module's table."""
        years, _ = signed_interval(first.time, second.time)
        known = 1 - (second.time - first.time).isnan().float()
        swapped = (years < 0).view(-1, 1, 1, 1, 1)
        earlier = torch.where(swapped, second.image, first.image)
        later = torch.where(swapped, first.image, second.image)
        z, target = self._embed_pair(earlier, later)
        self.log_metric("feature_std", feature_std(z))
        self.log_metric("skipped", 1 - known.mean())
        cosine = F.cosine_similarity(self.forecast(z, years.abs()).float(), target.float())
        return {"prediction": weighted_mean(1 - cosine, known)}

    def project(self, image: Tensor) -> Tensor:
        """Embeddings z ``(B, projection)`` of images ``(B, C, D, H, W)``."""
        return self.projector(mean_and_max(self.backbone(image, [self.tap])[self.tap]))

    def forecast(self, z: Tensor, years: Tensor) -> Tensor:
        """Embeddings ``(B, projection)`` predicted for ``(B,)`` years after z, up to their length."""
        return self.predictor(torch.cat([z, torch.stack([years, years.log1p()], 1).to(z.dtype)], 1))

    def _embed_pair(self, earlier: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
        """The earlier views' z, and the targets of the later ones, without gradient."""
        if self.teacher is None:
            one, two = self.project(torch.cat([earlier, later])).chunk(2)
            return one, two.detach()
        with torch.no_grad():
            target = self.teacher["projector"](mean_and_max(self.teacher["backbone"](later, [self.tap])[self.tap]))
        return self.project(earlier), target
