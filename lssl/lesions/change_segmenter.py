"""ChangeSegmenter: what has changed since the previous visit, such as new lesions, from both visits.

=========== ===================================================================================================== ======
term        formula                                                                                               weight
=========== ===================================================================================================== ======
supervised  batch Dice without background + cross-entropy weighted by class (:class:`lssl.losses.DiceCE`), on the 1
            grid of the later visit
=========== ===================================================================================================== ======

Three baselines of longitudinal segmentation, as LongiSeg (Rokuss et al., 2024, arXiv:2409.13416) names them: both
visits as channels, a difference of features, and difference weighting of skip connections
(:mod:`lssl.networks.difference_weighting`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.data.previous import Previous
from lssl.losses import deep_supervision
from lssl.networks.backbone import Backbone
from lssl.networks.difference_weighting import DifferenceWeighting
from lssl.segmentation.segmentation_task import SegmentationTask
from lssl.segmentation.volumes import both_visits, segment_grid, shown
from lssl.utils.errors import InputError
from lssl.views.sampler import View, ViewSampler

__all__ = ["ChangeSegmenter"]


class ChangeSegmenter(SegmentationTask):
    """Segmentation of change: the label map of a visit tells what has changed since the visit before it.

    A sample is a labelled visit with its previous one; visits without an earlier visit of known order are left out.
    Predictions are on the grid of the later visit. What the earlier visit's field of view does not hold is neither
    learned nor predicted.

    Args:
        backbone: network; see ``combine`` for its input channels.
        combine: ``subtract``: the network sees each visit alone, and the head the later one's output and what was
            added since the earlier one's. ``weight``: the encoder sees each visit alone, and the decoder the later
            one's features, weighted by their difference at every skip connection and the bottleneck; see
            :class:`lssl.networks.difference_weighting.DifferenceWeighting`, whose norms belong to the part ``head``.
            ``concatenate``: the network sees both as channels, those of the earlier visit first, so its
            ``in_channels`` are twice the images'; pretrained weights need ``input_channels: adapt``.
        min_lesion: mm³; smaller components are no lesions in scores and tables.
        min_overlap: share of a lesion's voxels for it to be found, or confirmed; see
            :func:`lssl.metrics.lesions.lesion_scores`.
        views: their geometry must be ``aligned``, which is the default here.
        **common: see :class:`lssl.segmentation.segmentation_task.SegmentationTask`.
    """

    LOSS_WEIGHTS: ClassVar = {"supervised": 1.0}

    def __init__(
        self,
        backbone: Backbone,
        combine: Literal["subtract", "weight", "concatenate"] = "subtract",
        min_lesion: float = 3.0,
        min_overlap: float = 0.1,
        views: ViewSampler | None = None,
        **common: Any,
    ) -> None:
        super().__init__(backbone, views=views or ViewSampler(geometry="aligned"), **common)
        self.require_aligned("a change is seen")
        if combine not in ("subtract", "weight", "concatenate"):
            raise InputError(f"combine is {combine!r}; choose subtract, weight or concatenate.")
        if min_lesion < 0 or not 0 < min_overlap <= 1:
            raise InputError(
                f"min_lesion is a volume in mm³ and min_overlap a share above 0, "
                f"not {min_lesion:g} and {min_overlap:g}."
            )
        self.combine, self.min_lesion, self.min_overlap = combine, min_lesion, min_overlap
        self.weighting: DifferenceWeighting | None = None
        if combine == "weight":
            self.weighting = DifferenceWeighting(backbone.network, backbone.in_channels, self.views.size)

    @property
    def previous(self) -> Previous:
        """A change is one since an earlier visit."""
        return "required"

    @property
    def exports(self) -> bool:
        """It needs two visits."""
        return False

    @property
    def head_channels(self) -> int:
        """Those of the network's output; of both visits if they are subtracted."""
        return self.backbone.out_channels * (2 if self.combine == "subtract" else 1)

    @property
    def trained_head(self) -> nn.Module:
        """The 1×1×1 convolution, with the norms of the differences if there are any."""
        return self.head if self.weighting is None else nn.ModuleList([self.head, self.weighting])

    def check_channels(self) -> None:
        """Refuses a network that does not take the channels of one visit, or of both if they are concatenated."""
        if self.combine != "concatenate":
            super().check_channels()
            return
        self.check_both_channels("combine: concatenate", "combine to subtract")

    # --- training -----------------------------------------------------------------------------------------------------

    def losses(self, batch: PairBatch | Mapping[str, PairBatch]) -> dict[str, Tensor]:
        """The term of labelled visits, each after its previous one."""
        pairs = batch if isinstance(batch, PairBatch) else batch["labelled"]
        with self.phase("views"):
            first, second = self.views(pairs, self.generator)
        return self.terms(first, second)

    def terms(self, first: View, second: View) -> dict[str, Tensor]:
        """The term of an earlier and a later view."""
        if second.label is None:
            raise InputError("The later visits of a batch have no label map, from which change could be learned.")
        maps = [self.unmirrored(logits, second) for logits in self.logits(first.image, second.image)]
        known = shown(first.source_affine, first.source_extent, second.affine, second.size)
        target = self.to_class_index(second.label[:, 0]).masked_fill(~known, -1)
        return {"supervised": deep_supervision(self.supervised, maps, target)}

    def logits(self, earlier: Tensor, later: Tensor) -> list[Tensor]:
        """``(B, K, ...)`` of images ``(B, C, ...)``, from each output of the network, the finest first."""
        if self.combine == "concatenate":
            return [self.head(each) for each in self.backbone.outputs(torch.cat([earlier, later], 1))]
        images = torch.cat([earlier, later])
        if self.weighting is not None:
            with self.weighting.within(self.backbone.network, len(later)):
                return [self.head(each) for each in self.backbone.outputs(images)]
        both = [each.chunk(2) for each in self.backbone.outputs(images)]
        return [self.head(torch.cat([new, new - old], 1)) for old, new in both]

    # --- whole visits -------------------------------------------------------------------------------------------------

    def segmented(self, batch: PairBatch) -> Tensor:
        """Change of the later visit, on its own grid; the earlier one is brought onto it through the frame.

        Beyond the earlier visit's field of view, nobody knows, and there is none.
        """
        seen, matrix = both_visits(batch, self.spacing, self.known_classes().number)
        shape = batch.extent[0, 1].tolist()
        change = segment_grid(seen, matrix, shape, self._probabilities, self.views.size, self.window_overlap)
        known = shown(batch.affines[:, 0], batch.extent[:, 0], batch.affines[:, 1], shape)[0]
        return change.where(known, 0)

    def _probabilities(self, both: Tensor) -> Tensor:
        earlier, later = both.chunk(2, 1)
        return self.logits(earlier, later)[0].float().softmax(1)

    def configure_callbacks(self) -> list[Callback]:
        """Also scores in ``test``, files in ``predict``."""
        from lssl.lesions.report import ChangeReport
        from lssl.lesions.writer import ChangeWriter

        return [*super().configure_callbacks(), ChangeReport(), ChangeWriter()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also how visits are combined."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["combine"] = self.combine

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint whose visits are combined otherwise."""
        if (theirs := checkpoint.get("combine", self.combine)) != self.combine:
            raise InputError(f"ckpt_path: it was trained with combine: {theirs}, and combine is {self.combine} here.")
        super().on_load_checkpoint(checkpoint)
