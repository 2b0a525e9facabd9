"""Anatomical embedding: every voxel finds itself again, in another view, visit or subject (SAM).

Yan, Cai, Jin, Miao, Guo, Harrison, Tang, Xiao, Lu, Lu: "SAM: Self-supervised Learning of Pixel-wise Anatomical
Embeddings in Radiological Images", IEEE TMI 2022 (arXiv 2012.02383). One network with two heads sees two views whose
correspondence is known. The *fine* map distinguishes a point from its surroundings; the *coarse* map distinguishes
regions of the body. Both are L2-normalised voxel by voxel. For the direction 1 → 2, anchors x lie on view 1's lattice
where view 2 shows them too. u is the map of view 1, v that of view 2, and v(C x) is v interpolated at x and normalised:

======== ============================================================================================= ======
term     formula                                                                                       weight
======== ============================================================================================= ======
fine     InfoNCE of (u(x), v(C x)) against hard, then diverse voxels of both views farther than        1
         ``exclusion`` mm from x; ranked by the sum of the fine and the interpolated coarse similarity
coarse   the same in the coarse map with its own exclusion, and against voxels of other subjects       1
======== ============================================================================================= ======

The direction 2 → 1 swaps the views, and each term is the mean of both. See :class:`lssl.losses.MinedInfoNCE`.

Differences from the published code:

* Points are compared at interpolated features; the published code uses the nearest voxel within some mm.
* Excluded voxels have the logit -∞. The published similarity 0 can outrank true negatives.
* The exclusion radius is 8 mm instead of 20 mm, because a brain is small.
* Views rotate and change in contrast, as MR needs.
* Positives may come from another visit (``views.same_visit``).
* A subject is never its own negative, even if a batch holds it twice.
* A sample whose views share no point is left out; the published code compares it with itself.
* A mirror never confuses left and right: both views are mirrored, or neither.

:class:`lssl.correspondence.matchers.EmbeddingMatcher` reads checkpoints of this strategy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.correspondence.matchers import descriptors
from lssl.data.batch import PairBatch
from lssl.losses import MinedInfoNCE
from lssl.networks.backbone import Backbone, Tap
from lssl.networks.heads import Projector, TapHeads, feature_std, to_rows
from lssl.strategy import Strategy
from lssl.utils.distributed import gather, world_size
from lssl.utils.errors import InputError, positive
from lssl.views import geometry as geo
from lssl.views.points import at_points, corresponding_points
from lssl.views.sampler import View

__all__ = ["AnatomicalEmbedding", "CoarseMap", "FineMap"]

Maps = list[tuple[Tensor, Tap]]


@dataclass
class FineMap:
    """Options of the fine map: its tap, its anchors and their negatives.

    Attributes:
        tap: tap of the map; SAM's has stride 2.
        anchors: number of anchors per sample and direction.
        hard: hardest candidates kept per anchor (SAM: 2000).
        diverse: negatives drawn from them (SAM: 500).
        exclusion: radius in mm around an anchor; nothing inside it is a negative.
    """

    tap: str = "decoder.1"
    anchors: int = 100
    hard: int = 2000
    diverse: int = 500
    exclusion: float = 8.0

    def __post_init__(self) -> None:
        positive(anchors=self.anchors)
        if self.exclusion < 0:
            raise InputError(f"exclusion: give 0 mm or more, not {self.exclusion:g}.")


@dataclass
class CoarseMap(FineMap):
    """Options of the coarse map.

    Attributes:
        tap: tap of the map; SAM's has stride 16.
        anchors: number of anchors per sample and direction; a small map gives fewer.
        hard: hardest candidates kept per anchor (SAM: 250).
        diverse: negatives drawn from them (SAM: 200).
        exclusion: radius in mm; choose at least the diagonal of the map's voxel.
        cross_subject_negatives: voxels drawn from all views of the batch (SAM: 1000). Each is a negative for anchors of
            other subjects. They are drawn anywhere, so a few show the anchor's own anatomy.
    """

    tap: str = "bottleneck"
    hard: int = 250
    diverse: int = 200
    exclusion: float = 32.0
    cross_subject_negatives: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cross_subject_negatives < 0:
            raise InputError(f"cross_subject_negatives: give 0 or more, not {self.cross_subject_negatives}.")


class AnatomicalEmbedding(Strategy):
    """Voxels find themselves again in another view, by a fine and a coarse embedding (SAM, Yan et al., 2022).

    Args:
        backbone: network and taps.
        fine: the fine map; ``None`` takes :class:`FineMap` with its defaults.
        coarse: the coarse map; ``None`` takes :class:`CoarseMap` with its defaults.
        hidden: width of the heads' hidden layer.
        embedding: channels of each map (SAM: 128).
        norm: normalisation in the heads: ``batch`` or ``layer``.
        temperature: temperature of both terms. SAM uses 0.5; the shipped config uses 0.1 and reports the difference.
        foreground: draw anchors on the foreground of both views only.
        **common: see :class:`lssl.task.Task`.
    """

    LOSS_WEIGHTS: ClassVar = {"fine": 1.0, "coarse": 1.0}

    def __init__(
        self,
        backbone: Backbone,
        fine: FineMap | None = None,
        coarse: CoarseMap | None = None,
        hidden: int = 128,
        embedding: int = 64,
        norm: Literal["batch", "layer"] = "batch",
        temperature: float = 0.5,
        foreground: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(backbone, **common)
        positive(embedding=embedding, hidden=hidden)
        maps: dict[str, FineMap] = {"fine": fine or FineMap(), "coarse": coarse or CoarseMap()}
        backbone.check_taps([level.tap for level in maps.values()])
        self._check_views()
        self.levels = {name: level for name, level in maps.items() if self.uses(name)}
        if not self.levels:
            raise InputError("loss_weights: give fine or coarse a weight other than 0.")
        self._check_strides()
        self.taps = [level.tap for level in self.levels.values()]
        backbone.freeze_unused(self.taps)
        self.heads = TapHeads(
            {
                name: Projector(backbone.taps[level.tap].channels, hidden, embedding, norm=norm)
                for name, level in self.levels.items()
            }
        )
        self.foreground = foreground
        self.mined = nn.ModuleDict(
            {name: MinedInfoNCE(temperature, level.hard, level.diverse) for name, level in maps.items()}
        )

    def anatomical_maps(self, image: Tensor) -> Maps:
        """L2-normalised float32 maps ``(B, D, ...)`` of images ``(B, C, ...)`` and their taps, the finest first.

        Images are padded behind their last voxels until the network's strides divide their sides; the maps cover the
        padding too.
        """
        features = self.backbone(self.backbone.pad(image), self.taps)
        return [
            (F.normalize(self.heads.maps(name, features[level.tap]).float(), dim=1), self.backbone.taps[level.tap])
            for name, level in self.levels.items()
        ]

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """See the module's table."""
        maps = self.anatomical_maps(torch.cat([first.image, second.image]))
        terms, stds = {}, []
        for number, (name, (values, tap)) in enumerate(zip(self.levels, maps, strict=True)):
            with torch.no_grad():
                ranked = descriptors(maps[number:])  # both maps rank the fine one; the coarse one ranks itself
            sides = [
                _Side(view, tap, rows, rank)
                for view, rows, rank in zip((first, second), values.chunk(2), ranked.chunk(2), strict=True)
            ]
            state, losses = self.generator.get_state(), []
            for one, other in (sides, sides[::-1]):
                self.generator.set_state(state)  # both directions draw alike, so the order of the views does not matter
                losses.append(self._direction(name, one, other, batch.subject))
            terms[name] = torch.stack(losses).mean()
            stds.append(feature_std(to_rows(values).flatten(0, 1)))
        self.log_metric("feature_std", torch.stack(stds).amin())  # the smaller one of the two maps
        return terms

    def _direction(self, name: str, one: _Side, other: _Side, subject: Tensor) -> Tensor:
        """Loss of one view's anchors; negatives come from both views and, in the coarse map, from other subjects."""
        level, generator = self.levels[name], self.generator
        points_mm, weight = corresponding_points(
            one.view, other.view, one.tap, level.anchors, generator, self.foreground
        )
        candidates = torch.cat([one.points_mm, other.points_mm], 1).float()
        apart = torch.cdist(points_mm.float(), candidates, compute_mode="donot_use_mm_for_euclid_dist")
        rows = torch.cat([to_rows(one.maps), to_rows(other.maps)], 1)
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            ranking = one.at(one.rank, points_mm) @ torch.cat([to_rows(one.rank), to_rows(other.rank)], 1).mT
        return self.mined[name](
            one.at(one.maps, points_mm),
            other.at(other.maps, points_mm),
            rows,
            apart > level.exclusion,
            generator,
            ranking,
            self._other_subjects(level, rows, subject),
            weight,
        )

    def _other_subjects(self, level: FineMap, rows: Tensor, subject: Tensor) -> tuple[Tensor, Tensor] | None:
        """Drawn rows ``(L, D)``, and a mask ``(B, L)``: true where a row belongs to another subject than the sample."""
        wanted = level.cross_subject_negatives if isinstance(level, CoarseMap) else 0
        if not wanted:
            return None
        samples, each = rows.shape[:2]
        count = min(math.ceil(wanted / world_size()), samples * each)  # every rank draws its share
        drawn = torch.rand(samples * each, generator=self.generator).topk(count).indices
        drawn = drawn.to(rows.device, non_blocking=True)
        strangers = subject[:, None] != gather(subject[drawn // each])
        return gather(rows.flatten(0, 1)[drawn]), strangers

    def _check_views(self) -> None:
        views = self.views
        if views.flip[0] and views.geometry == "independent" and not views.flip_together:
            raise InputError(
                "views: AnatomicalEmbedding distinguishes left from right; set views.flip_together, or views.flip to 0."
            )

    def _check_strides(self) -> None:
        taps = [level.tap for level in self.levels.values()]
        strides = [self.backbone.taps[tap].stride for tap in taps]
        if any(low > high for low, high in zip(strides[0], strides[-1], strict=True)):
            raise InputError(f"fine, coarse: tap '{taps[0]}' is coarser than tap '{taps[1]}'; swap them.")


@dataclass
class _Side:
    """One side of a direction: the view, its embedding, and the features that rank its voxels.

    Attributes:
        view: B views.
        tap: tap of the maps.
        maps: ``(B, D, ...)`` embedding.
        rank: ``(B, E, ...)`` ranking features on the same lattice, without gradient.
    """

    view: View
    tap: Tap
    maps: Tensor
    rank: Tensor

    @property
    def points_mm(self) -> Tensor:
        """``(B, N, 3)`` positions of the lattice in mm."""
        affine = geo.feature_affine(self.view.affine, self.tap.stride, self.tap.offset)
        return geo.transform(affine, geo.lattice(self.maps.shape[2:], affine.device))

    def at(self, maps: Tensor, points: Tensor) -> Tensor:
        """``(B, K, D)`` of unit length at points of the frame."""
        return F.normalize(at_points(maps, self.view, self.tap, points), dim=-1)
