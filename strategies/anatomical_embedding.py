"""Anatomical embedding: every voxel finds itself again, in another view, visit or subject (SAM).

Yan, Cai, Jin, Miao, Guo, Harrison, Tang, Xiao, Lu, Lu: "SAM: Self-supervised Learning of Pixel-wise Anatomical
Embeddings in Radiological Images", IEEE TMI 2022 (arXiv 2012.02383). Two views of known mutual geometry go through one
network with two heads: a *fine* map tells a place from its surroundings, a *coarse* one tells a region of the body from
the others. Both are L2-normalised voxel by voxel. For the direction 1 → 2, with anchors x on view 1's lattice that view
2 shows too, u the map of view 1, v that of view 2, and v(C x) interpolated at x's place in view 2 and normalised again:

======== ============================================================================================= ======
term     formula                                                                                       weight
======== ============================================================================================= ======
fine     InfoNCE of (u(x), v(C x)) against hard, then diverse voxels of both views farther than        1
         ``exclusion`` mm from x; ranked by the sum of the fine and the interpolated coarse similarity
coarse   the same in the coarse map with its own exclusion, and against voxels of other subjects       1
======== ============================================================================================= ======

and the same with the views swapped; a term is the mean of both directions. See :class:`lssl.losses.MinedInfoNCE`.

What differs from the published code, and why: places are compared at interpolated features, not at the nearest voxel
within some mm; excluded voxels have the logit -∞ (there: similarity 0, which can outrank true negatives); 8 mm are
excluded, not 20, as a brain is small; views rotate and change in contrast, as MR needs; half of the positives may come
from another visit (``views.same_visit``); a subject is no stranger to itself, however often a batch holds it; a sample
whose views share no place is left out (there: compared with itself). Left and right are never confused by a mirror:
both views are mirrored together, or none.

A checkpoint of it is what :class:`lssl.correspondence.matchers.EmbeddingMatcher` takes.
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
    """Where the fine map is read and what its anchors are told from.

    Attributes:
        tap: SAM's has stride 2.
        anchors: per sample and direction.
        hard: candidates kept per anchor (SAM: 2000).
        diverse: of them used (SAM: 500).
        exclusion: mm around an anchor within which nothing is a negative.
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
    """The same for the coarse map.

    Attributes:
        tap: SAM's has stride 16.
        anchors: fewer where the map is small.
        hard: candidates kept per anchor (SAM: 250).
        diverse: of them used (SAM: 200).
        exclusion: at least the diagonal of the map's voxel, in mm.
        cross_subject_negatives: voxels drawn from all views of the batch, as negatives of the subjects they are not of
            (SAM: 1000). They are drawn whatever their place, so a few show the anchor's own anatomy.
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
        fine: the fine map; ``None``: :class:`FineMap` as it is.
        coarse: the coarse map; ``None``: :class:`CoarseMap` as it is.
        hidden: width of the heads' hidden layer.
        embedding: channels of each map (SAM: 128).
        norm: of the heads: ``batch``, or ``layer``.
        temperature: of both terms; SAM's is 0.5. The shipped config takes 0.1 and says what it changed.
        foreground: anchors on the foreground of both views only.
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

        Images whose sides the network's strides do not divide are padded behind their last voxels, and so are the maps.
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
                ranked = descriptors(maps[number:])  # the fine map is ranked by both, the coarse one by itself
            sides = [
                _Side(view, tap, rows, rank)
                for view, rows, rank in zip((first, second), values.chunk(2), ranked.chunk(2), strict=True)
            ]
            state, losses = self.generator.get_state(), []
            for one, other in (sides, sides[::-1]):
                self.generator.set_state(state)  # both directions draw alike: neither view is the first
                losses.append(self._direction(name, one, other, batch.subject))
            terms[name] = torch.stack(losses).mean()
            stds.append(feature_std(to_rows(values).flatten(0, 1)))
        self.log_metric("feature_std", torch.stack(stds).amin())  # of the map that fills less of its sphere
        return terms

    def _direction(self, name: str, one: _Side, other: _Side, subject: Tensor) -> Tensor:
        """Anchors of one view against both views, and against other subjects in the coarse map."""
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
        """Drawn rows ``(L, D)`` of all samples, and which samples ``(B, L)`` are of another subject."""
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
                "views: AnatomicalEmbedding tells left from right: set views.flip_together to true, or views.flip to 0."
            )

    def _check_strides(self) -> None:
        taps = [level.tap for level in self.levels.values()]
        strides = [self.backbone.taps[tap].stride for tap in taps]
        if any(low > high for low, high in zip(strides[0], strides[-1], strict=True)):
            raise InputError(f"fine, coarse: tap '{taps[0]}' is coarser than tap '{taps[1]}'; swap them.")


@dataclass
class _Side:
    """One view, its embedding and what its voxels are ranked by.

    Attributes:
        view: B views.
        tap: where the maps lie.
        maps: ``(B, D, ...)`` embedding.
        rank: ``(B, E, ...)`` on the same lattice, without gradient.
    """

    view: View
    tap: Tap
    maps: Tensor
    rank: Tensor

    @property
    def points_mm(self) -> Tensor:
        """``(B, N, 3)`` mm of the lattice."""
        affine = geo.feature_affine(self.view.affine, self.tap.stride, self.tap.offset)
        return geo.transform(affine, geo.lattice(self.maps.shape[2:], affine.device))

    def at(self, maps: Tensor, points: Tensor) -> Tensor:
        """``(B, K, D)`` of unit length at points of the frame."""
        return F.normalize(at_points(maps, self.view, self.tap, points), dim=-1)
