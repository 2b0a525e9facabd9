"""Segmenter: fine-tuning on few labels, accurate and consistent over time.

=========== ===================================================================================================== ======
term        formula                                                                                               weight
=========== ===================================================================================================== ======
supervised  batch Dice without background + cross-entropy weighted by class (:class:`lssl.losses.DiceCE`)         1
consistency ½ L(p_A, q_B→A) + ½ L(p_B, q_A→B), L the Dice of soft-max p with the other visit's prediction q,      0
            brought onto p's own grid through the frame (:class:`lssl.losses.Consistency`)
=========== ===================================================================================================== ======

Published (Ren et al., NeurIPS 2022): DiceCE with the background and without class weights; consistency at weight 1 with
hard pseudo-labels, every voxel and every pair alike; its step and that of the supervised term in turn. Here, one step
optimises both terms. Both visits may differ, so options restrict the consistency to confident voxels (``threshold``),
late steps (``ramp``), soft targets (``targets``) or short intervals (``interval``).

With ``context: previous`` the network also sees the visit before the one it segments, without its labels, as further
channels (as the baseline of LongiSeg, Rokuss et al., 2024, arXiv:2409.13416, which takes its labels, too). First visits
have none, and in training it is dropped from some samples; then these channels are 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lssl.data.batch import PairBatch
from lssl.data.previous import Previous
from lssl.data.source import DataSource
from lssl.losses import Consistency, deep_supervision
from lssl.networks.backbone import Backbone
from lssl.segmentation.segmentation_task import SegmentationTask
from lssl.segmentation.volumes import both_visits, check_memory, largest_part, later_visit, segment, segment_grid
from lssl.utils.errors import InputError, positive
from lssl.utils.intervals import interval_weight, require_intervals
from lssl.views import geometry as geo
from lssl.views.alignment import bring
from lssl.views.sampler import View

__all__ = ["Segmenter"]


class Segmenter(SegmentationTask):
    """Segmentation of visits, from a pretrained network or from scratch (second part of Ren et al., NeurIPS 2022).

    Args:
        backbone: network; a 1×1×1 convolution maps its output to classes, with deep supervision all of its outputs.
        targets: of the consistency, ``hard`` as published, or ``soft``.
        threshold: consistency counts voxels whose target is at least this probable.
        absent: consistency also counts classes that are absent from the other visit, as published.
        interval: years τ; the consistency of a pair counts ``exp(-Δt/τ)``, and 0 if its interval is unknown.
            ``None``: equal weights.
        ramp: share of the steps over which the consistency's weight rises, as ``exp(-5 (1 - t)²)`` (Laine and Aila,
            ICLR 2017).
        context: ``previous``: the network sees the previous visit, too, where its order is known: its ``in_channels``
            are twice the images', those of the earlier visit first. Views must be ``aligned``; pretrained weights need
            ``input_channels: adapt``; there is no consistency then.
        context_dropout: share of the samples whose context is dropped in training.
        largest: keeps of a segmented visit the largest part that hangs together, all classes taken as one; what lies
            apart, such as islands in the scalp, becomes background. For structures that touch one another.
        **common: see :class:`.segmentation_task.SegmentationTask`.
    """

    LOSS_WEIGHTS: ClassVar = {"supervised": 1.0, "consistency": 0.0}

    def __init__(
        self,
        backbone: Backbone,
        targets: Literal["hard", "soft"] = "hard",
        threshold: float = 0.0,
        absent: bool = True,
        interval: float | None = None,
        ramp: float = 0.0,
        context: Literal["none", "previous"] = "none",
        context_dropout: float = 0.25,
        largest: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(backbone, **common)
        if interval is not None:
            positive(interval=interval)
        if not 0 <= ramp <= 1:
            raise InputError(f"ramp is a share of the steps, not {ramp}.")
        self.consistency = Consistency(targets, threshold, absent)
        self.interval, self.ramp, self.largest = interval, ramp, largest
        if context not in ("none", "previous") or not 0 <= context_dropout <= 1:
            raise InputError(
                f"context is none or previous and context_dropout a share of the samples, not {context!r} and "
                f"{context_dropout}."
            )
        self.context, self.context_dropout = context, context_dropout
        if context == "previous":
            self.require_aligned("context: previous helps")
            if self.uses("consistency"):
                raise InputError("context: previous and loss_weights.consistency exclude each other; choose one.")

    @property
    def previous(self) -> Previous:
        """The context, where it is known."""
        return "no" if self.context == "none" else "where known"

    @property
    def exports(self) -> bool:
        """Not with a context."""
        return self.context == "none"

    def check_channels(self) -> None:
        """Refuses a network that does not take the channels of a visit, and of its context."""
        if self.context == "none":
            super().check_channels()
        else:
            self.check_both_channels("context: previous", "context to none")

    @property
    def uses_unlabelled(self) -> bool:
        """For the consistency."""
        return self.uses("consistency")

    def check_options(self, data: DataSource) -> None:
        """Refuses an interval where none is known."""
        if self.interval is not None and self.uses("consistency"):
            require_intervals(data.table)

    def losses(self, batch: PairBatch | Mapping[str, PairBatch]) -> dict[str, Tensor]:
        """Terms of ``labelled`` and ``unlabelled`` pairs, or both terms of the same pairs.

        Labelled visits are drawn first, so their crops do not depend on unlabelled pairs. Views without label are
        excluded from the supervised term.
        """
        if self.context == "previous":
            return self._in_context(batch if isinstance(batch, PairBatch) else batch["labelled"])
        if isinstance(batch, PairBatch):
            return self.terms(*self._draw(batch))
        terms: dict[str, Tensor] = {}
        for name, term in (("labelled", "supervised"), ("unlabelled", "consistency")):
            if batch.get(name) is not None:
                terms |= self.terms(*self._draw(batch[name]), [term])
        return terms

    def _draw(self, batch: PairBatch) -> tuple[View, View]:
        with self.phase("views"):
            return self.views(batch, self.generator)

    def _in_context(self, batch: PairBatch) -> dict[str, Tensor]:
        """The supervised term of later visits, each with its earlier one where there is one and it is not dropped."""
        first, second = self._draw(batch)
        if second.label is None:
            raise InputError("The labelled visits of a batch have no label map.")
        kept = torch.rand(len(batch), generator=self.generator) >= self.context_dropout
        kept = kept.to(batch.session.device, non_blocking=True) & (batch.session[:, 0] != batch.session[:, 1])
        image = torch.cat([first.image * kept[:, None, None, None, None], second.image], 1)
        maps = [self.unmirrored(self.head(out), second) for out in self.backbone.outputs(image)]
        target = self.to_class_index(second.label[:, 0])
        return {"supervised": deep_supervision(self.supervised, maps, target)}

    def logits(self, image: Tensor) -> Tensor:
        """``(B, C, ...) → (B, K, ...)``."""
        return self.head(self.backbone(image, output=True)["output"])

    def terms(
        self, first: View, second: View, wanted: Sequence[str] = ("supervised", "consistency")
    ) -> dict[str, Tensor]:
        """The terms of views that are requested and have a weight."""
        maps = [self.head(out).chunk(2) for out in self.backbone.outputs(torch.cat([first.image, second.image]))]
        logits = [(self.unmirrored(one, first), self.unmirrored(other, second)) for one, other in maps]
        terms = {}
        if "supervised" in wanted and self.uses("supervised") and first.label is not None and second.label is not None:
            target = self.to_class_index(torch.cat([first.label, second.label])[:, 0])
            terms["supervised"] = deep_supervision(self.supervised, [torch.cat(both) for both in logits], target)
        if "consistency" in wanted and self.uses("consistency"):
            terms["consistency"] = self._consistency(*logits[0], first, second)
        return terms

    def weight(self, term: str) -> float:
        """The consistency's rises."""
        return super().weight(term) * (self._rise() if term == "consistency" else 1)

    def _rise(self) -> float:
        """The consistency's weight at this step, as a share of its last one."""
        if not self.ramp:
            return 1.0
        steps = max(1.0, self.ramp * self.trainer.estimated_stepping_batches)
        return math.exp(-5 * (1 - min(1.0, self.global_step / steps)) ** 2)

    def _consistency(self, first_logits: Tensor, second_logits: Tensor, first: View, second: View) -> Tensor:
        one, other = first_logits.float().softmax(1), second_logits.float().softmax(1)
        weight = None if self.interval is None else interval_weight(first.time, second.time, self.interval)
        losses = []
        for own, view, its, source in ((one, first, other, second), (other, second, one, first)):
            brought, valid = bring(its.detach(), source, view)
            losses.append(self.consistency(own, brought, valid, weight))
        return (losses[0] + losses[1]) / 2

    # --- whole visits -------------------------------------------------------------------------------------------------

    def segment(self, image: Tensor, affine: Tensor) -> Tensor:
        """``(D, H, W)`` class of each voxel of a visit ``(C, D, H, W)`` of any spacing, without context."""
        own, window, overlap = geo.spacing(affine), self.views.size, self.window_overlap
        if self.context == "previous":
            image = torch.cat([torch.zeros_like(image), image])
        check_memory(image.shape, own.tolist(), self.spacing.tolist(), self.known_classes().number, image.device)
        return segment(image, own, self.spacing, self._probabilities, window, overlap)

    def segmented(self, batch: PairBatch) -> Tensor:
        """Classes of the later visit of a batch, in the context of the earlier one; or of the only visit."""
        label = self._segmented(batch)
        return largest_part(label) if self.largest else label

    def _segmented(self, batch: PairBatch) -> Tensor:
        if self.context == "none" or bool(batch.session[0, 0] == batch.session[0, 1]):
            only = later_visit(batch)
            return self.segment(only.images[0, 1], only.affines[0, 1])
        seen, matrix = both_visits(batch, self.spacing, self.known_classes().number)
        shape = batch.extent[0, 1].tolist()
        return segment_grid(seen, matrix, shape, self._probabilities, self.views.size, self.window_overlap)

    def _probabilities(self, crop: Tensor) -> Tensor:
        return self.logits(crop).float().softmax(1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also the context."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["context"] = self.context

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint with another context."""
        if (theirs := checkpoint.get("context", "none")) != self.context:
            raise InputError(f"ckpt_path: it was trained with context: {theirs}, and context is {self.context} here.")
        super().on_load_checkpoint(checkpoint)

    def configure_callbacks(self) -> list[Callback]:
        """Also scores in ``test``, files in ``predict``."""
        from lssl.segmentation.report import SegmentationReport
        from lssl.segmentation.writer import SegmentationWriter

        return [*super().configure_callbacks(), SegmentationReport(), SegmentationWriter()]
