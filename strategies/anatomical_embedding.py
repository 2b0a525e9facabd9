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

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.correspondence.matchers import descriptors
from lssl.data.batch import PairBatch
from lssl.losses import MinedInfoNCE
from lssl.networks.backbone import Backbone, Tap
from lssl.networks.heads import Projector, spread, voxelwise
from lssl.strategy import Strategy
from lssl.utils.errors import InputError, positive
from lssl.views import geometry as geo
from lssl.views.points import at_points, corresponding_points
from lssl.views.sampler import View

__all__ = ["AnatomicalEmbedding"]

Maps = list[tuple[Tensor, Tap]]


class AnatomicalEmbedding(Strategy):
    """Voxels find themselves again in another view, by a fine and a coarse embedding (SAM, Yan et al., 2022).

    Args:
        backbone: network and taps.
        fine: tap of the fine map; SAM's has stride 2.
        coarse: tap of the coarse map; SAM's has stride 16.
        hidden: width of the heads' hidden layer.
        embedding: channels of each map (SAM: 128).
        norm: of the heads: ``batch``, or ``layer``.
        anchors: of the fine map, per sample and direction.
        coarse_anchors: of the coarse map; fewer where the map is small.
        temperature: of both terms; SAM's is 0.5. The shipped config takes 0.1 and says what it changed.
        hard: candidates kept per fine anchor (SAM: 2000).
        diverse: of them used (SAM: 500).
        coarse_hard: likewise in the coarse map (SAM: 250).
        coarse_diverse: likewise (SAM: 200).
        others: coarse voxels drawn from all views of the batch, as negatives of the subjects they are not of (SAM:
            1000). They are drawn whatever their place, so a few show the anchor's own anatomy.
        exclusion: mm around a fine anchor within which nothing is a negative.
        coarse_exclusion: likewise in the coarse map; at least its voxel's diagonal.
        foreground: anchors on the foreground of both views only.
        weights: term → weight.
        **common: see :class:`lssl.strategy.Strategy`.
    """

    TERMS = ("fine", "coarse")

    def __init__(
        self,
        backbone: Backbone,
        fine: str = "decoder.1",
        coarse: str = "bottleneck",
        hidden: int = 128,
        embedding: int = 64,
        norm: Literal["batch", "layer"] = "batch",
        anchors: int = 100,
        coarse_anchors: int = 100,
        temperature: float = 0.5,
        hard: int = 2000,
        diverse: int = 500,
        coarse_hard: int = 250,
        coarse_diverse: int = 200,
        others: int = 1000,
        exclusion: float = 8.0,
        coarse_exclusion: float = 32.0,
        foreground: bool = True,
        weights: dict[str, float] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(backbone, weights=weights, **common)
        positive(anchors=anchors, coarse_anchors=coarse_anchors, embedding=embedding, hidden=hidden)
        if min(exclusion, coarse_exclusion, others) < 0:
            raise InputError("exclusion, coarse_exclusion, others: give 0 or more.")
        backbone.check_taps([fine, coarse])
        self._check_views()
        self.levels = {name: tap for name, tap in (("fine", fine), ("coarse", coarse)) if self.uses(name)}
        if not self.levels:
            raise InputError("weights: give fine or coarse a weight other than 0.")
        self._check_strides()
        backbone.freeze_unused(list(self.levels.values()))
        self.heads = nn.ModuleDict(
            {
                name: Projector(backbone.taps[tap].channels, hidden, embedding, norm=norm)
                for name, tap in self.levels.items()
            }
        )
        self.anchors = {"fine": anchors, "coarse": coarse_anchors}
        self.exclusion = {"fine": exclusion, "coarse": coarse_exclusion}
        self.others, self.foreground = others, foreground
        self.fine_loss = MinedInfoNCE(temperature, hard, diverse)
        self.coarse_loss = MinedInfoNCE(temperature, coarse_hard, coarse_diverse)

    def anatomical_maps(self, image: Tensor) -> Maps:
        """L2-normalised float32 maps ``(B, D, ...)`` of images ``(B, C, ...)`` and their taps, the finest first."""
        features = self.backbone(image, list(self.levels.values()))
        return [
            (F.normalize(voxelwise(self.heads[name], features[tap]).float(), dim=1), self.backbone.taps[tap])
            for name, tap in self.levels.items()
        ]

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """See the module's table."""
        maps = self.anatomical_maps(torch.cat([first.image, second.image]))
        terms, spreads = {}, []
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
            spreads.append(spread(sides[0].rows(values).flatten(0, 1)))
        self.note("spread", torch.stack(spreads).amin())  # of the map that fills less of its sphere
        return terms

    def _direction(self, name: str, one: _Side, other: _Side, subject: Tensor) -> Tensor:
        """Anchors of one view against both views, and against other subjects in the coarse map."""
        count, generator = self.anchors[name], self.generator
        places, weight = corresponding_points(one.view, other.view, one.tap, count, generator, self.foreground)
        candidates = torch.cat([one.places, other.places], 1).float()
        apart = torch.cdist(places.float(), candidates, compute_mode="donot_use_mm_for_euclid_dist")
        rows = torch.cat([one.rows(one.maps), other.rows(other.maps)], 1)
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            ranking = one.at(one.rank, places) @ torch.cat([one.rows(one.rank), other.rows(other.rank)], 1).mT
        loss = self.fine_loss if name == "fine" else self.coarse_loss
        return loss(
            one.at(one.maps, places),
            other.at(other.maps, places),
            rows,
            apart > self.exclusion[name],
            generator,
            ranking,
            self._other_subjects(rows, subject) if name == "coarse" and self.others else None,
            weight,
        )

    def _other_subjects(self, rows: Tensor, subject: Tensor) -> tuple[Tensor, Tensor]:
        """Drawn rows ``(L, D)`` of all samples, and which samples ``(B, L)`` are of another subject."""
        samples, each = rows.shape[:2]
        drawn = torch.rand(samples * each, generator=self.generator).topk(min(self.others, samples * each)).indices
        drawn = drawn.to(rows.device, non_blocking=True)
        return rows.flatten(0, 1)[drawn], subject[:, None] != subject[drawn // each]

    def _check_views(self) -> None:
        views = self.views
        if views.flip[0] and views.geometry == "independent" and not views.flip_together:
            raise InputError(
                "views: AnatomicalEmbedding tells left from right: set views.flip_together to true, or views.flip to 0."
            )

    def _check_strides(self) -> None:
        strides = [self.backbone.taps[tap].stride for tap in self.levels.values()]
        if any(low > high for low, high in zip(strides[0], strides[-1], strict=True)):
            raise InputError(
                f"fine, coarse: tap '{self.levels['fine']}' is coarser than tap '{self.levels['coarse']}'; swap them."
            )


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
    def places(self) -> Tensor:
        """``(B, N, 3)`` mm of the lattice."""
        affine = geo.feature_affine(self.view.affine, self.tap.stride, self.tap.offset)
        return geo.transform(affine, geo.lattice(self.maps.shape[2:], affine.device))

    def at(self, maps: Tensor, points: Tensor) -> Tensor:
        """``(B, K, D)`` of unit length at points of the frame."""
        return F.normalize(at_points(maps, self.view, self.tap, points), dim=-1)

    @staticmethod
    def rows(maps: Tensor) -> Tensor:
        """``(B, D, ...)`` as ``(B, N, D)``."""
        return maps.flatten(2).transpose(1, 2)
