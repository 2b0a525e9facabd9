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
from lssl.networks.backbone import Backbone, Tap
from lssl.networks.heads import Projector, TapHeads, feature_std, to_rows
from lssl.networks.teacher import Teacher
from lssl.strategy import Strategy
from lssl.utils.distributed import gather, weighted_mean
from lssl.utils.errors import InputError, positive
from lssl.utils.random import host_generator
from lssl.views.alignment import AlignedLattice, align_views
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
        """Losses ``(2,)`` of both directions."""


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
        return self.loss(sides.query, sides.target, sides.valid, sides.weight)


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
        return self.loss(*(sides.pick(rows) for rows in (sides.query, sides.target, sides.points_mm)), sides.weight)


class VICReg(Objective):
    """Mean squared difference, and variance and covariance against collapse; neither teacher nor predictor."""

    LOSS_WEIGHTS: ClassVar = {"similarity": 25.0, "variance": 25.0, "covariance": 1.0}
    needs_teacher = False

    def forward(self, sides: Directions) -> Tensor:
        """Losses at every valid voxel."""
        with torch.autocast(sides.query.device.type, enabled=False):
            distance = (sides.query.float() - sides.target.float()).square().mean(-1)
            per_sample = (distance * sides.valid).sum(-1) / sides.valid.sum(-1).clamp_min(1)
            return weighted_mean(per_sample, sides.weight)


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
        seed = int(host_generator(self.generator).integers(2**62))
        keys = torch.Generator(images.device).manual_seed(seed)
        for tap, share in self.tap_weights.items():
            features = online[tap]
            z = self.projectors.rows(tap, to_rows(features))  # (2 B, N, D)
            query = self.predictors.rows(tap, z) if tap in self.predictors else z
            own = z.transpose(1, 2).unflatten(2, features.shape[2:])
            sides = self._directions(first, second, query, target.get(tap, own), self.backbone.taps[tap], keys)
            kept.append(sides.weight)
            stds.append(feature_std(z.flatten(0, 1)))
            for name, value in self._tap_terms(z, sides).items():
                terms[name] = terms[name] + share * value if name in terms else share * value
        self.log_metric("skipped", 1 - torch.stack(kept).mean())
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

    def _directions(
        self, first: View, second: View, query: Tensor, target: Tensor, tap: Tap, keys: torch.Generator
    ) -> Directions:
        """1 → 2 and 2 → 1: the other view's map on this view's lattice."""
        lattice = align_views(first, second, tap, target.shape[2:], self.border, self.foreground)
        weight = (lattice.valid.sum(-1) >= self.min_points).float()
        aligned = lattice.of_other(target)
        return Directions(query.unflatten(0, (2, -1)), aligned, lattice, weight, self.samples, keys)

    def _tap_terms(self, z: Tensor, sides: Directions) -> dict[str, Tensor]:
        terms = {}
        if self.uses("similarity"):
            terms["similarity"] = self.objective(sides).mean()
        if self.uses("variance") or self.uses("covariance"):
            chosen = sides.pick(z.unflatten(0, (2, -1)))
            rows = [gather(side.flatten(0, 1)) for side in chosen]
            used = [gather(side.repeat_interleave(chosen.shape[2])) for side in sides.weight]
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
class Directions:
    """The maps of both views and the aligned maps of the other, on the same lattices: 1 → 2, then 2 → 1.

    Attributes:
        query: ``(2, B, N, D)`` features of view 1, then of view 2.
        target: ``(2, B, N, D)`` aligned features of the other view; undefined where not valid.
        lattice: where the features lie, and which are valid.
        weight: ``(2, B)`` 1, or 0 for a sample with too few valid voxels.
        samples: number of voxels that are drawn.
        keys: draws them, on the device.
    """

    query: Tensor
    target: Tensor
    lattice: AlignedLattice
    weight: Tensor
    samples: int
    keys: torch.Generator

    @property
    def valid(self) -> Tensor:
        """``(2, B, N)`` bool, Ω."""
        return self.lattice.valid

    @property
    def points_mm(self) -> Tensor:
        """``(2, B, N, 3)`` positions in mm."""
        return self.lattice.points_mm

    @cached_property
    def drawn(self) -> Tensor:
        """``(2, B, K)`` indices of valid voxels; they do not depend on the order of the views.

        A sample with fewer repeats them; one without any gets arbitrary indices.
        """
        _, samples, number = self.valid.shape
        key = torch.rand(samples, number, generator=self.keys, device=self.valid.device)
        order = torch.where(self.valid, key, -1.0).topk(min(self.samples, number)).indices
        found = self.valid.sum(-1, keepdim=True).clamp_min(1)
        return order.gather(2, torch.arange(order.shape[2], device=order.device) % found)

    def pick(self, rows: Tensor) -> Tensor:
        """Drawn rows ``(2, B, K, D)`` of ``(2, B, N, D)``."""
        return rows.gather(2, self.drawn[..., None].expand(-1, -1, -1, rows.shape[3]))
