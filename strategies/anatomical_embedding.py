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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
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
from lssl.utils.random import host_generator, seeded
from lssl.utils.transfer import send
from lssl.views.alignment import lattice_parts, lattice_sum
from lssl.views.draws import draw_distinct
from lssl.views.points import at_grid, feature_affines, plan_points, sampling_grids
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
        seed, plans = self._plan(first, second, batch.host.subject)
        sent = send([array for plan in plans for array in plan], first.image.device)
        keys, width = torch.Generator(first.image.device).manual_seed(seed), len(plans[0])
        terms, stds = {}, []
        for number, (name, (values, _)) in enumerate(zip(self.levels, maps, strict=True)):
            with torch.no_grad():
                rank = descriptors(maps[number:])  # both maps rank the fine one; the coarse one ranks itself
            plan = sent[number * width : (number + 1) * width]
            terms[name] = self._term(name, values, rank, plan, batch.subject, keys)
            stds.append(feature_std(to_rows(values).flatten(0, 1)))
        self.log_metric("feature_std", torch.stack(stds).amin())  # the smaller one of the two maps
        return terms

    def _term(
        self, name: str, maps: Tensor, rank: Tensor, plan: Sequence[Tensor], subject: Tensor, keys: torch.Generator
    ) -> Tensor:
        """Mean loss of the anchors of both views: those of view 1 find themselves in view 2, then the other way round.

        Negatives come from both views, the anchor's own first, and, in the coarse map, from other subjects.

        Args:
            name: of the level.
            maps: ``(2 B, D, ...)`` embedding of both views.
            rank: ``(2 B, E, ...)`` features on the same lattice that rank candidates, without gradient.
            plan: what :meth:`_plan` gave for the level, on the device.
            subject: ``(B,)`` ids.
            keys: draws among the hardest candidates, on the device.
        """
        grid, index, shown, weight, *position, drawn, own = plan
        swapped = torch.cat(maps.chunk(2)[::-1])
        rows = torch.cat([to_rows(maps), to_rows(swapped)], 1)  # (2 B, 2 N, D)
        with torch.no_grad(), torch.autocast(maps.device.type, enabled=False):
            candidates = lattice_sum(position).unflatten(0, (2, -1))  # (2, 2 B, N, 3), in the own view and in the other
            apart = torch.cdist(shown, candidates, compute_mode="donot_use_mm_for_euclid_dist")
            apart = torch.cat(apart.unbind(), 2)
            others = to_rows(rank)
            ranking = pick(others, index) @ torch.cat([others, torch.cat(others.chunk(2)[::-1])], 1).mT
        return self.mined[name](
            pick(to_rows(maps), index),
            F.normalize(at_grid(swapped, grid), dim=-1),
            rows,
            apart > self.levels[name].exclusion,
            keys,
            ranking,
            self._other_subjects(rows, subject, drawn, own),
            weight,
        ).mean()

    def _plan(self, first: View, second: View, subject: np.ndarray) -> tuple[int, list[list[np.ndarray]]]:
        """A seed for the device, and for each level what :meth:`_term` needs of the host, in its order.

        These are, for anchors of view 1 and then of view 2: where the other map is sampled, indices in the own map,
        positions in mm in the own view and, where tissue moves, in the other, and weights; the positions of the own and
        of the other view's lattices, in parts; rows of other subjects and whose they are. Both directions draw alike,
        so the views may be swapped.
        """
        draws, views = host_generator(self.generator), (first.host, second.host)
        seed, taps = int(draws.integers(2**62)), [self.backbone.taps[tap] for tap in self.taps]
        most = max(level.anchors for level in self.levels.values())
        points = plan_points(*views, taps, most, seeded(seed), self.foreground, both_ways=True)
        grids = sampling_grids(
            views, taps * 2, points.places
        )  # (2 T, 2, B, K, 3): of both views' anchors, in both views
        places, affines = points.places.astype(np.float32), np.concatenate([view.affine for view in views])
        plans, count = [], len(taps)
        for n, (level, lattices) in enumerate(zip(self.levels.values(), feature_affines(affines, taps), strict=True)):
            size = [side // s for side, s in zip(first.size, taps[n].stride, strict=True)]
            features = math.prod(size)
            anchors = min(level.anchors, features)
            grid = np.concatenate([grids[n, 1], grids[n + count, 0]])[:, :anchors]
            index = points.index[n::count].reshape(-1, points.index.shape[2])[:, :anchors]
            place = np.concatenate([places[n], places[n + count, ::-1]], 1)[:, :, :anchors]  # (V, 2 B, K, 3), own first
            rows = np.concatenate([lattices, np.roll(lattices, len(subject), 0)])[:, :3]
            position = [part.astype(np.float32) for part in lattice_parts(rows, size)]
            drawn = self._strangers(level, len(subject) * 2 * features, draws)
            weight = points.weight[n::count].reshape(-1)
            plans.append([grid, index, place, weight, *position, drawn, subject[drawn // (2 * features)]])
        return seed, plans

    @staticmethod
    def _strangers(level: FineMap, rows: int, draws: np.random.Generator) -> np.ndarray:
        """A rank's share of the rows of all views that are negatives for other subjects."""
        wanted = level.cross_subject_negatives if isinstance(level, CoarseMap) else 0
        count = min(-(-wanted // world_size()), rows)
        return draw_distinct(np.array([rows]), 1, count, draws)[0, 0] if count else np.zeros(0, np.int64)

    @staticmethod
    def _other_subjects(rows: Tensor, subject: Tensor, drawn: Tensor, own: Tensor) -> tuple[Tensor, Tensor] | None:
        """Drawn rows ``(2, L, D)`` and a mask ``(2 B, L)``: true where a row belongs to another subject."""
        if not len(drawn):
            return None
        chosen = rows.unflatten(0, (2, -1)).flatten(1, 2)[:, drawn]
        strangers = subject[:, None] != gather(own)
        return gather(chosen.transpose(0, 1)).transpose(0, 1), strangers.repeat(2, 1)

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


def pick(rows: Tensor, index: Tensor) -> Tensor:
    """Rows ``(B, K, D)`` of ``(B, N, D)``."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))
