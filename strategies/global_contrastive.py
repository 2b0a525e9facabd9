"""Global contrastive pretraining: one embedding per view; views of a pair are pulled together.

The encoder's features are pooled to one vector per view. An *objective* (a class, chosen in the config) pulls the two
vectors of a pair together and keeps the vectors from collapsing to one point:

============ ========================================= ================================= ===========================
objective    what prevents collapse                    paper                             advised pairs, all devices
============ ========================================= ================================= ===========================
``SimCLR``   other subjects of the batch               Chen et al., ICML 2020            64 and more
``MoCo``     a queue of other subjects' earlier keys   He et al., CVPR 2020; v2, 2020    any, 4 and more
``BYOL``     a predictor and a slow teacher            Grill et al., NeurIPS 2020        16 and more
``VICReg``   variance and covariance of dimensions     Bardes et al., ICLR 2022          32 and more
============ ========================================= ================================= ===========================

Widths, temperatures and momenta are those of the papers where small 3D batches allow. Elsewhere they are values common
for small batches (a queue of 2048, embeddings of 128 channels). Heads have batch norm, as published. ``layer`` norm is
often advised for small batches, but did worse in 200 steps on procedural heads with 8 pairs (one seed): SimCLR learned
half as much and MoCo collapsed. Pooled features of different images are nearly parallel at first.

Positives are two crops of one visit, two visits of a subject, or a mix, by ``views.same_visit``. Two visits as
positives teach the network to ignore what changes between them. If the change *is* your signal, ``interval`` gives
pairs less weight the longer the time between their visits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.losses import Covariance, NegativeCosine, NTXent, QueueInfoNCE, Variance
from lssl.networks.backbone import Backbone
from lssl.networks.heads import Projector, feature_std, mean_and_max
from lssl.networks.queue import KeyQueue
from lssl.networks.teacher import Teacher
from lssl.strategy import Strategy
from lssl.utils.distributed import gather, weighted_mean, world_size
from lssl.utils.errors import InputError, positive
from lssl.utils.intervals import interval_weight, require_intervals
from lssl.views.sampler import View

__all__ = ["BYOL", "GlobalContrastive", "MoCo", "Objective", "SimCLR", "VICReg"]

Pair = tuple[Tensor, Tensor]
"""Embeddings ``(B, D)`` of view 1 and of view 2."""


class Objective(nn.Module, ABC):
    """Heads on pooled features, and the loss terms of a pair of embeddings; the strategy gives the pooled width.

    Defaults that differ between objectives are ``None`` in the signature and named in the docstring. The parser keeps
    options of the same name when a config's class is replaced, so BYOL would otherwise inherit MoCo's values.

    Attributes:
        projector: maps pooled features to embeddings.
        predictor: maps the online embedding to the target's; the identity if the objective has no predictor.
        momentum: first and last momentum of the teacher that embeds the targets; ``None`` for no teacher.
    """

    #: Term → weight.
    LOSS_WEIGHTS: ClassVar[dict[str, float]] = {"similarity": 1.0}
    #: Fewest pairs over all devices that the objective can compare.
    MIN_PAIRS = 1
    projector: nn.Module
    predictor: nn.Module
    momentum: tuple[float, float] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.predictor = nn.Identity()

    @abstractmethod
    def forward(self, online: Pair, target: Pair, subject: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """Terms of ``(B, D)`` predictions and targets of both views.

        Args:
            online: predictions of view 1 and of view 2.
            target: the teacher's embeddings of the same views, or the online ones without a teacher.
            subject: ``(B,)`` subject ids.
            weight: ``(B,)`` share of each pair in the mean; ``None`` weighs all alike.
        """


class SimCLR(Objective):
    """NT-Xent over the subjects of the batch (Chen et al., ICML 2020).

    Args:
        in_features: given by the strategy.
        hidden: width of the projector's hidden layer (2048).
        projection: width of the embedding (128).
        norm: normalisation in the projector.
        temperature: temperature of the soft-max.
    """

    MIN_PAIRS = 2

    def __init__(
        self,
        in_features: int,
        hidden: int | None = None,
        projection: int | None = None,
        norm: Literal["batch", "layer"] = "batch",
        temperature: float = 0.2,
    ) -> None:
        super().__init__()
        self.projector = Projector(in_features, hidden or 2048, projection or 128, norm=norm)
        self.loss = NTXent(temperature)

    def forward(self, online: Pair, target: Pair, subject: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """See :class:`lssl.losses.NTXent`."""
        return {"similarity": self.loss(*online, subject, weight)}


class MoCo(Objective):
    """InfoNCE against a queue of earlier keys, both views as queries (He et al., CVPR 2020; MoCo v2, 2020).

    Args:
        in_features: given by the strategy.
        hidden: width of the projector's hidden layer (2048).
        projection: width of the embedding (128).
        norm: normalisation in the projector.
        temperature: temperature of the soft-max.
        queue: number of stored keys; with at most half as many as subjects, the keys are distinct.
        momentum: first momentum of the teacher (0.99).
        final: last momentum of the teacher.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int | None = None,
        projection: int | None = None,
        norm: Literal["batch", "layer"] = "batch",
        temperature: float = 0.2,
        queue: int = 2048,
        momentum: float | None = None,
        final: float = 0.999,
    ) -> None:
        super().__init__()
        projection = projection or 128
        self.projector = Projector(in_features, hidden or 2048, projection, norm=norm)
        self.momentum = (0.99 if momentum is None else momentum, final)
        self.queue = KeyQueue(queue, projection)
        self.loss = QueueInfoNCE(temperature)

    def forward(self, online: Pair, target: Pair, subject: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """See :class:`lssl.losses.QueueInfoNCE`; in training, pushes the keys of both views to the queue afterwards."""
        (q1, q2), (k1, k2) = online, target
        queue, subject_ids = self.queue.keys, self.queue.subject_ids
        pair = torch.stack([self.loss(q, k, subject, queue, subject_ids, weight) for q, k in ((q1, k2), (q2, k1))])
        if self.training:
            self.queue.push(F.normalize(torch.cat([k1, k2]).float(), dim=1), subject.repeat(2))
        return {"similarity": pair.mean()}


class BYOL(Objective):
    """Predicts the teacher's embedding of the other view (Grill et al., NeurIPS 2020).

    The term is the mean of ``-cos``, in [-1, 1]; the published loss is ``4 (1 + term)``.

    Args:
        in_features: given by the strategy.
        hidden: width of the heads' hidden layer (4096).
        projection: width of the embedding (256).
        norm: normalisation in the heads.
        momentum: first momentum of the teacher (0.996); it rises to 1.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int | None = None,
        projection: int | None = None,
        norm: Literal["batch", "layer"] = "batch",
        momentum: float | None = None,
    ) -> None:
        super().__init__()
        hidden, projection = hidden or 4096, projection or 256
        self.projector = Projector(in_features, hidden, projection, norm=norm)
        self.predictor = Projector(projection, hidden, projection, norm=norm)
        self.momentum = (0.996 if momentum is None else momentum, 1.0)
        self.loss = NegativeCosine()

    def forward(self, online: Pair, target: Pair, subject: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """See :class:`lssl.losses.NegativeCosine`."""
        p1, t1, p2, t2 = (vectors[:, None] for vectors in (online[0], target[0], online[1], target[1]))
        return {"similarity": self.loss(p1, t1, p2, t2, weight)}


class VICReg(Objective):
    """Invariance, variance and covariance of the embeddings (Bardes et al., ICLR 2022).

    Args:
        in_features: given by the strategy.
        hidden: width of the projector's hidden layers (2048).
        projection: width of the embedding (2048).
        layers: Linear layers of the projector.
        norm: normalisation in the projector.
    """

    LOSS_WEIGHTS: ClassVar[dict[str, float]] = {"similarity": 25.0, "variance": 25.0, "covariance": 1.0}
    MIN_PAIRS = 2

    def __init__(
        self,
        in_features: int,
        hidden: int | None = None,
        projection: int | None = None,
        layers: int = 3,
        norm: Literal["batch", "layer"] = "batch",
    ) -> None:
        super().__init__()
        self.projector = Projector(in_features, hidden or 2048, projection or 2048, layers, norm)
        self.variance, self.covariance = Variance(), Covariance()

    def forward(self, online: Pair, target: Pair, subject: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """Mean squared difference and the two regularisers, over the batches of all ranks."""
        z1, z2 = (z.float() for z in online)
        distance = (z1 - z2).square().mean(1)
        everyone = gather(z1), gather(z2)
        return {
            "similarity": weighted_mean(distance, weight),
            "variance": self.variance(*everyone),
            "covariance": self.covariance(*everyone),
        }


class GlobalContrastive(Strategy):
    """One embedding per view; views of a pair are pulled together (SimCLR, MoCo, BYOL or VICReg, 2020-2022).

    Args:
        backbone: network and taps.
        taps: feature maps that are pooled (mean and maximum) and concatenated; with encoder taps alone, the decoder
            does not run.
        objective: SimCLR, MoCo, BYOL, VICReg, or another :class:`Objective`; the module's table says which suits which
            batch.
        interval: τ in years; a pair has weight ``exp(-Δt/τ)``, and 0 if its interval is unknown
            (:func:`lssl.utils.intervals.interval_weight`). ``None`` weighs all pairs alike.
        **common: see :class:`lssl.task.Task`; the loss weights are the objective's own by default.
    """

    def __init__(
        self,
        backbone: Backbone,
        taps: Sequence[str] = ("bottleneck",),
        objective: Callable[[int], Objective] = MoCo,
        interval: float | None = None,
        **common: Any,
    ) -> None:
        taps = list(dict.fromkeys(taps))
        backbone.check_taps(taps)
        if not taps:
            raise InputError("taps: name at least one feature map to pool.")
        if interval is not None:
            positive(interval=interval)
        super().__init__(backbone, **common)
        self.taps, self.interval = taps, interval
        self.objective = objective(2 * sum(backbone.taps[tap].channels for tap in taps))
        self.declare_terms(self.objective.LOSS_WEIGHTS)
        backbone.freeze_unused(self.taps)
        if self.objective.momentum is not None:
            followed = {"backbone": backbone, "projector": self.objective.projector}
            self.teacher = Teacher(followed, *self.objective.momentum)

    def setup(self, stage: str) -> None:
        """Refuses ``interval`` if no interval is known."""
        super().setup(stage)
        if self.interval is not None and stage == "fit":
            require_intervals(self.data_source.table)

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """The objective's terms of the two embeddings."""
        self._check_batch(len(batch))
        images = torch.cat([first.image, second.image])
        z = self.objective.projector(self._pool(self.backbone(images, self.taps)))
        self.log_metric("feature_std", feature_std(z))
        online = self.objective.predictor(z).chunk(2)
        target = self._target(images)
        target = z if target is None else target
        terms = self.objective(online, target.chunk(2), batch.subject, self._weight(first, second))
        return {name: value for name, value in terms.items() if self.uses(name)}

    @torch.no_grad()
    def _target(self, images: Tensor) -> Tensor | None:
        if self.teacher is None:
            return None
        return self.teacher["projector"](self._pool(self.teacher["backbone"](images, self.taps)))

    @staticmethod
    def _pool(features: dict[str, Tensor]) -> Tensor:
        return torch.cat([mean_and_max(value) for value in features.values()], 1)

    def _weight(self, first: View, second: View) -> Tensor | None:
        if self.interval is None:
            return None
        return interval_weight(first.time, second.time, self.interval)

    def _check_batch(self, pairs: int) -> None:
        everywhere, fewest = pairs * world_size(), self.objective.MIN_PAIRS
        if self.training and everywhere < fewest:
            raise InputError(
                f"{type(self.objective).__name__} compares pairs with one another and needs {fewest} or more, but a "
                f"batch holds {everywhere}: raise data.init_args.batch_size."
            )
