"""Prior-guided local pretraining (PGL).

Xie, Zhang, Liao, Xia, Shen: "PGL: Prior-Guided Local Self-supervised Learning for 3D Medical Image Segmentation",
arXiv 2011.12640 (2020). An online network and a slowly moving teacher see two overlapping views. The *prior* is the
known geometry of the views: it says which voxels of both show the same point. The features must agree there.

The authors' repository holds no code, and the paper's text was not available. This implementation follows the
abstract and an independent re-implementer's notes. What neither states is chosen here and is an option: the heads'
widths and the teacher's momentum are BYOL's, the tap is the encoder's deepest, and the predictor runs before alignment.

In the direction 1 → 2, Ω are the voxels x of view 1's feature lattice that view 2 shows too:

========== ============ ==================================================================================== =======
objective  term         formula                                                                              weight
========== ============ ==================================================================================== =======
Cosine     similarity   mean over Ω of 2 - 2 cos(q₁(x), sg t₂(C x)): predictor against the teacher           1
InfoNCE    similarity   z₁(x) finds t₂(C x) among points farther than ``exclusion`` mm; without predictor    1
VICReg     similarity   mean over Ω of (z₁(x) - z₂(C x))²; neither teacher nor predictor                     25
VICReg     variance     as in VICReg, of z at drawn voxels of Ω                                              25
VICReg     covariance   likewise                                                                             1
========== ============ ==================================================================================== =======

The direction 2 → 1 swaps the views, and the loss is the mean of both. ``C`` composes the views' matrices with the tap's
stride and centre offset. It is never rounded: the target's map is interpolated on the online lattice, then normalised
voxel by voxel. ``loss_weights`` can add the variance and covariance terms to the other objectives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.losses import AlignedCosine, Covariance, DenseInfoNCE, Variance
from lssl.losses.aligned_cosine import mean_of_valid, sums_of_sets
from lssl.networks.backbone import Backbone
from lssl.networks.heads import Projector, TapHeads, feature_std, to_rows
from lssl.networks.teacher import Teacher
from lssl.strategy import Strategy
from lssl.utils.distributed import gather, weighted_mean
from lssl.utils.errors import InputError, positive
from lssl.utils.random import host_generator
from lssl.views.alignment import AlignedLattices, align_views
from lssl.views.sampler import View

__all__ = ["Cosine", "Directions", "InfoNCE", "Objective", "PriorGuidedLocal", "VICReg"]

Norm = Literal["batch", "layer"]


class Objective(nn.Module, ABC):
    """Makes aligned voxels of two views similar."""

    #: Term → weight.
    LOSS_WEIGHTS: ClassVar = {"similarity": 1.0, "variance": 0.0, "covariance": 0.0}
    #: Whether a teacher computes the other view's map.
    needs_teacher: ClassVar[bool] = True

    def predictor(self, width: int, hidden: int, norm: Norm) -> nn.Module | None:
        """A new head of this width from ``z`` to the target; ``None`` if the objective has none."""
        return None

    @abstractmethod
    def forward(self, sides: Directions) -> Tensor:
        """Losses ``(2, T)`` of both directions at T taps."""


class Cosine(Objective):
    """Predicts the teacher's map (BYOL, as in PGL); see :class:`lssl.losses.AlignedCosine`."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = AlignedCosine()

    def predictor(self, width: int, hidden: int, norm: Norm) -> nn.Module:
        """A head of two layers."""
        return Projector(width, hidden, width, norm=norm)

    def forward(self, sides: Directions) -> Tensor:
        """Losses at every valid voxel."""
        return self.loss(sides.query, sides.target, sides.valid, sides.weight, sides.counts)


class InfoNCE(Objective):
    """Each drawn voxel finds itself in the teacher's map; see :class:`lssl.losses.DenseInfoNCE`.

    Args:
        temperature: temperature of the soft-max.
        exclusion: radius in mm around a voxel; nothing inside it is a negative.
    """

    def __init__(self, temperature: float = 0.1, exclusion: float = 8.0) -> None:
        super().__init__()
        self.loss = DenseInfoNCE(temperature, exclusion)

    def forward(self, sides: Directions) -> Tensor:
        """Losses at drawn voxels."""
        drawn = (sides.pick(rows) for rows in (sides.query, sides.target, sides.points_mm))
        return torch.stack([self.loss(*each) for each in zip(*drawn, sides.weight.unbind(1), strict=True)], 1)


class VICReg(Objective):
    """Mean squared difference, and variance and covariance against collapse; neither teacher nor predictor."""

    LOSS_WEIGHTS: ClassVar = {"similarity": 25.0, "variance": 25.0, "covariance": 1.0}
    needs_teacher = False

    def forward(self, sides: Directions) -> Tensor:
        """Losses at every valid voxel."""
        with torch.autocast(sides.query.device.type, enabled=False):
            distance = (sides.query.float() - sides.target.float()).square().mean(-1)
            return weighted_mean(mean_of_valid(distance, sides.valid, sides.counts), sides.weight)


class PriorGuidedLocal(Strategy):
    """Online and teacher features agree at aligned voxels of two overlapping views (PGL, Xie et al., 2020).

    Args:
        backbone: network and taps.
        taps: compared feature maps.
        tap_weights: weight of each tap, normalised to sum 1; ``None`` weighs all alike.
        objective: Cosine (as in PGL), InfoNCE, VICReg, or another :class:`Objective`; see the module's table.
        hidden: width of the heads' hidden layers (BYOL: 4096).
        projection: width of z (BYOL: 256).
        norm: normalisation in the heads: ``batch``, or ``layer`` for batches with very few voxels.
        momentum: first momentum of the teacher; it rises to 1 by a cosine.
        foreground: compare voxels on the foreground of both visits only.
        border: width in features of the border to leave out of either map; padded convolutions see no data there.
        min_points: fewest shared voxels of a sample. A sample with fewer is left out of the mean, and the log gives
            the share of such samples (``skipped``).
        samples: voxels per sample and direction drawn for InfoNCE, variance and covariance.
        **common: see :class:`lssl.task.Task`.
    """

    shares: Tensor

    def __init__(
        self,
        backbone: Backbone,
        taps: Sequence[str] = ("bottleneck",),
        tap_weights: dict[str, float] | None = None,
        objective: Callable[[], Objective] = Cosine,
        hidden: int = 4096,
        projection: int = 256,
        norm: Norm = "batch",
        momentum: float = 0.996,
        foreground: bool = True,
        border: float = 0.0,
        min_points: int = 16,
        samples: int = 256,
        **common: Any,
    ) -> None:
        positive(min_points=min_points, samples=samples)
        if border < 0:
            raise InputError(f"border: give a number of features, 0 or more, not {border}.")
        super().__init__(backbone, **common)
        self.objective = objective()
        self.declare_terms(self.objective.LOSS_WEIGHTS)
        self.tap_weights = backbone.normalised_weights(taps, tap_weights)
        self.samples, self.foreground, self.border, self.min_points = samples, foreground, border, min_points
        self._check_maps()
        backbone.freeze_unused(list(self.tap_weights))
        projectors, predictors = {}, {}
        for tap in self.tap_weights:
            projectors[tap] = Projector(backbone.taps[tap].channels, hidden, projection, norm=norm)
            predictor = self.objective.predictor(projection, hidden, norm) if self.uses("similarity") else None
            if predictor is not None:
                predictors[tap] = predictor
        self.projectors, self.predictors = TapHeads(projectors), TapHeads(predictors)
        if self.objective.needs_teacher and self.uses("similarity"):
            self.teacher = Teacher({"backbone": backbone, "projectors": self.projectors}, momentum)
        self.variance, self.covariance = Variance(), Covariance()
        self.register_buffer("shares", torch.tensor(list(self.tap_weights.values())), persistent=False)

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """See the module's table."""
        images = torch.cat([first.image, second.image])
        online = self.backbone(images, list(self.tap_weights))
        z = {tap: self.projectors.rows(tap, to_rows(features)) for tap, features in online.items()}  # (2 B, N, D) each
        query = [self.predictors.rows(tap, each) if tap in self.predictors else each for tap, each in z.items()]
        own = [each.transpose(1, 2).unflatten(2, online[tap].shape[2:]) for tap, each in z.items()]
        sides = self._directions(first, second, query, self._target(images) or own)
        terms = {}
        if self.uses("similarity"):
            terms["similarity"] = self.objective(sides).mean(0)
        if self.uses("variance") or self.uses("covariance"):
            terms |= self._spread(torch.cat(list(z.values()), 1), sides)
        self.log_metric("skipped", 1 - sides.weight.mean())
        self.log_metric("feature_std", torch.stack([feature_std(each.flatten(0, 1)) for each in z.values()]).mean())
        return {name: (self.shares * values).sum() for name, values in terms.items()}

    @torch.no_grad()
    def _target(self, images: Tensor) -> list[Tensor]:
        """The teacher's projected maps; none if the online network is its own target."""
        if self.teacher is None:
            return []
        heads = self.teacher["projectors"]
        assert isinstance(heads, TapHeads)
        features = self.teacher["backbone"](images, list(self.tap_weights))
        return [heads.maps(tap, value) for tap, value in features.items()]

    def _directions(self, first: View, second: View, query: list[Tensor], target: list[Tensor]) -> Directions:
        """1 → 2 and 2 → 1: the other view's maps on this view's lattices."""
        seed = int(host_generator(self.generator).integers(2**62))
        keys = torch.Generator(first.image.device).manual_seed(seed)
        taps, sizes = [self.backbone.taps[tap] for tap in self.tap_weights], [maps.shape[2:] for maps in target]
        lattices = align_views(first, second, taps, sizes, self.border, self.foreground)
        weight = (sums_of_sets(lattices.valid, lattices.counts) >= self.min_points).float()
        rows = torch.cat(query, 1).unflatten(0, (2, -1))
        return Directions(rows, lattices.of_other(target), lattices, weight, self.samples, keys)

    def _spread(self, z: Tensor, sides: Directions) -> dict[str, Tensor]:
        """Variance and covariance ``(T,)`` at drawn voxels of all ranks."""
        losses = {"variance": self.variance, "covariance": self.covariance}
        found: dict[str, list[Tensor]] = {name: [] for name in losses if self.uses(name)}
        drawn = sides.pick(z.unflatten(0, (2, -1)))
        for chosen, weight in zip(drawn, sides.weight.unbind(1), strict=True):
            rows = [gather(side.flatten(0, 1)) for side in chosen]
            used = [gather(side.repeat_interleave(chosen.shape[2])) for side in weight]
            for name, values in found.items():
                values.append(losses[name](*rows, *used))
        return {name: torch.stack(values) for name, values in found.items()}

    def _check_maps(self) -> None:
        for name in self.tap_weights:
            sides = [n // s for n, s in zip(self.views.size, self.backbone.taps[name].stride, strict=True)]
            voxels = sides[0] * sides[1] * sides[2]
            if voxels < 2 * self.min_points:
                raise InputError(
                    f"min_points: tap '{name}' has {voxels} voxels in views of {'×'.join(map(str, self.views.size))}, "
                    f"so {self.min_points} shared ones are rare; use larger views, a finer tap or a smaller "
                    "min_points."
                )


@dataclass
class Directions:
    """The maps of both views and the aligned maps of the other, on the same lattices: 1 → 2, then 2 → 1.

    The N voxels are those of T taps, which follow one another.

    Attributes:
        query: ``(2, B, N, D)`` features of view 1, then of view 2.
        target: ``(2, B, N, D)`` aligned features of the other view; undefined where not valid.
        lattices: where the features lie, and which are valid.
        weight: ``(2, T, B)`` 1, or 0 for a sample with too few valid voxels.
        samples: number of voxels that are drawn at each tap.
        keys: draws them, on the device.
    """

    query: Tensor
    target: Tensor
    lattices: AlignedLattices
    weight: Tensor
    samples: int
    keys: torch.Generator

    @property
    def valid(self) -> Tensor:
        """``(2, B, N)`` bool, Ω."""
        return self.lattices.valid

    @property
    def counts(self) -> list[int]:
        """Numbers of voxels of the taps."""
        return self.lattices.counts

    @property
    def points_mm(self) -> Tensor:
        """``(2, B, N, 3)`` positions in mm."""
        return self.lattices.points_mm

    @cached_property
    def drawn(self) -> list[Tensor]:
        """Indices ``(2, B, K)`` of valid voxels of each tap; they do not depend on the order of the views.

        A sample with fewer repeats them; one without any gets arbitrary indices.
        """
        drawn = []
        for valid in self.valid.split(self.counts, 2):
            key = torch.rand(valid.shape[1:], generator=self.keys, device=valid.device)
            order = torch.where(valid, key, -1.0).topk(min(self.samples, valid.shape[2])).indices
            found = valid.sum(-1, keepdim=True).clamp_min(1)
            drawn.append(order.gather(2, torch.arange(order.shape[2], device=order.device) % found))
        return drawn

    def pick(self, rows: Tensor) -> list[Tensor]:
        """Drawn rows ``(2, B, K, D)`` of each tap, of ``(2, B, N, D)``."""
        each = zip(rows.split(self.counts, 2), self.drawn, strict=True)
        return [tap.gather(2, drawn[..., None].expand(-1, -1, -1, rows.shape[3])) for tap, drawn in each]
