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
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.losses import AlignedCosine, Covariance, DenseInfoNCE, Variance
from lssl.networks.backbone import Backbone, Tap
from lssl.networks.heads import Projector, TapHeads, feature_std, to_rows
from lssl.networks.teacher import Teacher
from lssl.strategy import Strategy
from lssl.utils.distributed import gather, weighted_mean
from lssl.utils.errors import InputError, positive
from lssl.views import geometry as geo
from lssl.views.points import draw
from lssl.views.sampler import View

__all__ = ["Cosine", "Direction", "InfoNCE", "Objective", "PriorGuidedLocal", "VICReg"]

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
    def forward(self, side: Direction) -> Tensor:
        """Loss of one direction."""


class Cosine(Objective):
    """Predicts the teacher's map (BYOL, as in PGL); see :class:`lssl.losses.AlignedCosine`."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = AlignedCosine()

    def predictor(self, width: int, hidden: int, norm: Norm) -> nn.Module:
        """A head of two layers."""
        return Projector(width, hidden, width, norm=norm)

    def forward(self, side: Direction) -> Tensor:
        """Loss at every valid voxel."""
        return self.loss(side.query, side.target, side.valid, side.weight)


class InfoNCE(Objective):
    """Each drawn voxel finds itself in the teacher's map; see :class:`lssl.losses.DenseInfoNCE`.

    Args:
        temperature: temperature of the soft-max.
        exclusion: radius in mm around a voxel; nothing inside it is a negative.
    """

    def __init__(self, temperature: float = 0.1, exclusion: float = 8.0) -> None:
        super().__init__()
        self.loss = DenseInfoNCE(temperature, exclusion)

    def forward(self, side: Direction) -> Tensor:
        """Loss at drawn voxels."""
        return self.loss(*(side.pick(rows) for rows in (side.query, side.target, side.points_mm)), side.weight)


class VICReg(Objective):
    """Mean squared difference, and variance and covariance against collapse; neither teacher nor predictor."""

    LOSS_WEIGHTS: ClassVar = {"similarity": 25.0, "variance": 25.0, "covariance": 1.0}
    needs_teacher = False

    def forward(self, side: Direction) -> Tensor:
        """Loss at every valid voxel."""
        with torch.autocast(side.query.device.type, enabled=False):
            distance = (side.query.float() - side.target.float()).square().mean(-1)
            per_sample = (distance * side.valid).sum(1) / side.valid.sum(1).clamp_min(1)
            return weighted_mean(per_sample, side.weight)


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

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """See the module's table."""
        images = torch.cat([first.image, second.image])
        online = self.backbone(images, list(self.tap_weights))
        target = self._target(images)
        terms: dict[str, Tensor] = {}
        kept, stds = [], []
        for tap, share in self.tap_weights.items():
            z = self.projectors.maps(tap, online[tap])
            query = self.predictors.maps(tap, z) if tap in self.predictors else z
            directions = self._directions(first, second, query, target.get(tap, z), self.backbone.taps[tap])
            kept += [direction.weight for direction in directions]
            stds.append(feature_std(to_rows(z).flatten(0, 1)))
            for name, value in self._tap_terms(z, directions).items():
                terms[name] = terms.get(name, images.new_zeros(())) + share * value
        self.log_metric("skipped", 1 - torch.cat(kept).mean())
        self.log_metric("feature_std", torch.stack(stds).mean())
        return terms

    @torch.no_grad()
    def _target(self, images: Tensor) -> dict[str, Tensor]:
        """The teacher's projected maps; empty if the online network is its own target."""
        if self.teacher is None:
            return {}
        heads = self.teacher["projectors"]
        assert isinstance(heads, TapHeads)
        features = self.teacher["backbone"](images, list(self.tap_weights))
        return {tap: heads.maps(tap, value) for tap, value in features.items()}

    def _directions(self, first: View, second: View, query: Tensor, target: Tensor, tap: Tap) -> list[Direction]:
        """1 → 2 and 2 → 1; the drawn voxels do not depend on the order of the views."""
        (q1, q2), (t1, t2) = query.chunk(2), target.chunk(2)
        scores = torch.rand(len(q1), q1[0, 0].numel(), generator=self.generator).to(q1.device, non_blocking=True)
        order = scores.argsort(1)
        return [self._direction(first, second, q1, t2, tap, order), self._direction(second, first, q2, t1, tap, order)]

    def _direction(self, view: View, other: View, q: Tensor, t: Tensor, tap: Tap, order: Tensor) -> Direction:
        """Brings the other view's map onto this view's lattice."""
        size = q.shape[2:]
        own, theirs = (geo.feature_affine(v.affine, tap.stride, tap.offset) for v in (view, other))
        aligned, valid = geo.align(t, theirs, own, size, self.border)
        points_mm = geo.transform(own, geo.lattice(size, own.device))
        valid = (
            valid.flatten(1) & view.contains(points_mm, self.foreground) & other.contains(points_mm, self.foreground)
        )
        drawn = order.gather(1, draw(valid.gather(1, order), self.samples))
        enough = (valid.sum(1) >= self.min_points).float()
        return Direction(to_rows(q), to_rows(aligned), points_mm, valid, drawn, enough)

    def _tap_terms(self, z: Tensor, directions: list[Direction]) -> dict[str, Tensor]:
        terms = {}
        if self.uses("similarity"):
            terms["similarity"] = torch.stack([self.objective(direction) for direction in directions]).mean()
        if self.uses("variance") or self.uses("covariance"):
            rows, used = [], []
            for maps, direction in zip(z.chunk(2), directions, strict=True):
                chosen = direction.pick(to_rows(maps))
                rows.append(gather(chosen.flatten(0, 1)))
                used.append(gather(direction.weight[:, None].expand(chosen.shape[:2]).flatten()))
            for name, loss in (("variance", self.variance), ("covariance", self.covariance)):
                if self.uses(name):
                    terms[name] = loss(*rows, *used)
        return terms

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
class Direction:
    """The map of one view and the aligned map of the other, on the same lattice.

    Attributes:
        query: ``(B, N, D)`` features of this view.
        target: ``(B, N, D)`` aligned features of the other view; undefined where not valid.
        points_mm: ``(B, N, 3)`` positions in mm.
        valid: ``(B, N)`` bool, Ω.
        drawn: ``(B, K)`` indices of valid voxels.
        weight: ``(B,)`` 1, or 0 for a sample with too few valid voxels.
    """

    query: Tensor
    target: Tensor
    points_mm: Tensor
    valid: Tensor
    drawn: Tensor
    weight: Tensor

    def pick(self, rows: Tensor) -> Tensor:
        """Drawn rows ``(B, K, D)`` of ``(B, N, D)``."""
        return rows.gather(1, self.drawn[..., None].expand(-1, -1, rows.shape[2]))
