"""Trajectory order: in which order the visits of a series were, of which the network sees two or more together.

After SSL-AD (Kaczmarek, Szeto, Nichyporuk, Arbel: "SSL-AD: Spatiotemporal Self-Supervised Learning for Generalizability
and Adaptability Across Alzheimer's Prediction Tasks and Datasets", 2025, arXiv 2509.10453). Only the abstract was
available; the paper's text and its code could not be read. It states that the order of a variable number of scans is
predicted, and that this together with a contrastive loss was best. Heads, formulas, weights and views are chosen here.

The features of one tap are pooled (mean and maximum) to one vector v per view. For the n views of a series, a
transformer f without places sees all v - v̄ together (v̄ is their mean) and gives each a score s, and a projector gives
z. t are the times in years:

======== ======================================================================================= ======
term     formula                                                                                 weight
======== ======================================================================================= ======
order    mean over pairs tᵢ < tⱼ of one series of log(1 + exp(-(sⱼ - sᵢ))), s = f(v - v̄)         1
contrast NT-Xent (SimCLR) of z of two visits of each series, against other subjects              1
======== ======================================================================================= ======

* *order* is the logistic loss of every pair of a series (RankNet, Burges et al., ICML 2005), but each score depends on
  all visits that are shown: what two visits cannot tell, such as a change that quickens in some subjects and goes the
  other way in others, three may. Guessing has log 2 ≈ 0.69. Of two visits, it is the term of
  :class:`.temporal_order.TemporalOrder` with another head.
* Each step of training shows n visits of every series, drawn uniformly from ``fewest`` to K (``visits_per_item`` of the
  data), so that the head orders any number of visits. Evaluation shows all K.
* If visits change places, scores do, too. So no network can learn that "the second one is later". Visits are presented
  in random order as well, because the first view is cut otherwise than those that are placed around it.
* A pair whose times are equal or unknown has no order: it is left out, and the log gives the share of such pairs
  (``skipped``), and that of series whose known order was found without a mistake (``sorted``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.losses import NTXent
from lssl.networks.backbone import Backbone
from lssl.networks.heads import Projector, feature_std, mean_and_max
from lssl.timed_strategy import SeriesStrategy
from lssl.utils.distributed import weighted_mean
from lssl.utils.errors import InputError, positive
from lssl.utils.intervals import signed_interval
from lssl.views.sampler import View

__all__ = ["SeriesScores", "TrajectoryOrder"]


class TrajectoryOrder(SeriesStrategy):
    """In which order two or more visits were that are seen together (after SSL-AD, Kaczmarek et al., 2025).

    Args:
        backbone: network and taps.
        tap: feature map that is pooled; one of the encoder, so that the decoder does not run.
        fewest: least number of visits that a step shows of each series, 2 or more.
        width: channels of the transformer.
        depth: its layers.
        heads: its attention heads, which divide ``width``.
        hidden: width of the projector's hidden layer.
        projection: width of z.
        norm: normalisation in the projector: ``batch``, or ``layer`` for batches of one series.
        temperature: of the contrast.
        **common: see :class:`lssl.task.Task`.
    """

    LOSS_WEIGHTS: ClassVar = {"order": 1.0, "contrast": 1.0}

    def __init__(
        self,
        backbone: Backbone,
        tap: str = "bottleneck",
        fewest: int = 2,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        hidden: int = 512,
        projection: int = 128,
        norm: Literal["batch", "layer", "none"] = "batch",
        temperature: float = 0.2,
        **common: Any,
    ) -> None:
        super().__init__(backbone, **common)
        positive(width=width, depth=depth, heads=heads, hidden=hidden, projection=projection)
        if fewest < 2:
            raise InputError(f"fewest is {fewest}; an order is of 2 visits or more.")
        if width % heads:
            raise InputError(f"heads is {heads}, which must divide width ({width}).")
        backbone.freeze_unused([tap])
        self.tap, self.fewest = tap, fewest
        pooled = 2 * backbone.taps[tap].channels
        self.head = SeriesScores(pooled, width, depth, heads).requires_grad_(self.uses("order"))
        self.projector = Projector(pooled, hidden, projection, norm=norm).requires_grad_(self.uses("contrast"))
        self.contrast = NTXent(temperature)

    def needs_times(self) -> bool:
        """The order needs them, the contrast does not."""
        return self.uses("order")

    def draw_series(self, batch: PairBatch) -> tuple[View, ...]:
        """Views of ``fewest`` to K visits of each series in training, else of all K, in random order."""
        most, draws = batch.visits_per_item, self.generator
        least = min(self.fewest, most) if self.training else most
        number = int(torch.randint(least, most + 1, (1,), generator=draws))
        chosen = torch.rand(len(batch), most, generator=draws).argsort(1)[:, :number]
        return self.views.series(batch.visits(chosen), draws)

    def series_terms(self, views: Sequence[View], batch: PairBatch) -> dict[str, Tensor]:
        """See the module's table."""
        vectors = self.pool([view.image for view in views])
        self.log_metric("feature_std", feature_std(vectors[:, 0]))
        terms = {}
        if self.uses("order"):
            terms["order"] = self._order(self.head(vectors), torch.stack([view.time for view in views], 1))
        if self.uses("contrast"):
            z1, z2 = self.projector(torch.cat([vectors[:, 0], vectors[:, 1]])).chunk(2)
            terms["contrast"] = self.contrast(z1, z2, batch.subject)
        return terms

    def _order(self, scores: Tensor, times: Tensor) -> Tensor:
        """The term of scores and times ``(B, n)``."""
        one, other = torch.triu_indices(scores.shape[1], scores.shape[1], 1, device=scores.device)
        years, ordered = signed_interval(times[:, one], times[:, other])
        wrong = -years.sign() * (scores[:, other] - scores[:, one])
        self.log_metric("skipped", 1 - ordered.mean())
        found = ((wrong < 0) | (ordered == 0)).all(1).float()
        self.log_metric("sorted", found.mean())
        return weighted_mean(F.softplus(wrong).flatten(), ordered.flatten())

    def pool(self, images: Sequence[Tensor]) -> Tensor:
        """``(B, n, 2 C)`` of n images ``(B, channels, D, H, W)``, which pass the network together."""
        features = self.backbone(torch.cat(list(images)), [self.tap])[self.tap]
        return mean_and_max(features).unflatten(0, (len(images), -1)).transpose(0, 1)

    def scores(self, images: Sequence[Tensor]) -> Tensor:
        """``(B, n)`` of n images ``(B, channels, D, H, W)`` that are seen together: later visits have higher scores."""
        return self.head(self.pool(images))


class SeriesScores(nn.Module):
    """A score of each vector of a set, which depends on all of them but not on their order.

    Args:
        channels: of a vector.
        width: of the layers.
        depth: number of layers.
        heads: of their attention.

    Example:
        >>> import torch
        >>> SeriesScores(6, 8, depth=1, heads=2)(torch.rand(4, 3, 6)).shape
        torch.Size([4, 3])
    """

    def __init__(self, channels: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """``(B, n, channels) → (B, n)`` float32."""
        with torch.autocast(vectors.device.type, enabled=False):  # small differences of large numbers
            rows = self.embed(vectors.float() - vectors.float().mean(1, keepdim=True))
            for layer in self.layers:
                rows = layer(rows)
            return self.score(rows).squeeze(2)
