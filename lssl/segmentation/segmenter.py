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
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.data.few_shot import require_labels
from lssl.data.pairs import visit_names
from lssl.data.source import DataSource
from lssl.losses import Consistency, DiceCE, deep_supervision
from lssl.networks.backbone import Backbone
from lssl.segmentation.classes import Classes, count_labels, refuse_empty, refuse_unknown
from lssl.segmentation.fine_tuned import FineTuned
from lssl.segmentation.scores import dice_scores, mean_dice
from lssl.segmentation.volumes import check_memory, check_visits, only_label, segment
from lssl.utils.distributed import every_rank
from lssl.utils.errors import InputError, positive
from lssl.utils.intervals import interval_weight, require_intervals
from lssl.views import geometry as geo
from lssl.views.sampler import View

__all__ = ["Segmenter"]


class Segmenter(FineTuned[PairBatch | Mapping[str, PairBatch]]):
    """Segmentation of visits, from a pretrained network or from scratch (second part of Ren et al., NeurIPS 2022).

    Args:
        backbone: network; a 1×1×1 convolution maps its output to classes, with deep supervision all of its outputs.
        classes: name → label values; other values are background. ``None`` makes every value in the data a class.
            Classes whose names differ by *left* and *right* (or L and R) are swapped in mirrored views.
        balance: cross-entropy weights are class frequencies to the power minus this; 0 gives equal weights.
        targets: of the consistency, ``hard`` as published, or ``soft``.
        threshold: consistency counts voxels whose target is at least this probable.
        absent: consistency also counts classes that are absent from the other visit, as published.
        interval: years τ; the consistency of a pair counts ``exp(-Δt/τ)``, and 0 if its interval is unknown.
            ``None``: equal weights.
        ramp: share of the steps over which the consistency's weight rises, as ``exp(-5 (1 - t)²)`` (Laine and Aila,
            ICLR 2017).
        window_overlap: overlap of neighbouring windows in whole visits, as a share of their side.
        ignore: label values of unannotated voxels, which are excluded from losses and scores. ``None``: 255, unless a
            class lists it or it is FreeSurfer's corpus callosum.
        **common: see :class:`.fine_tuned.FineTuned`.
    """

    class_of_value: Tensor
    label_values: Tensor
    mirrored_class: Tensor
    spacing: Tensor

    LOSS_WEIGHTS: ClassVar = {"supervised": 1.0, "consistency": 0.0}
    OWN_TABLE: ClassVar = True

    def __init__(
        self,
        backbone: Backbone,
        classes: dict[str, list[int]] | None = None,
        balance: float = 0.5,
        targets: Literal["hard", "soft"] = "hard",
        threshold: float = 0.0,
        absent: bool = True,
        interval: float | None = None,
        ramp: float = 0.0,
        window_overlap: float = 0.5,
        ignore: list[int] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(backbone, **common)
        if interval is not None:
            positive(interval=interval)
        if not 0 <= ramp <= 1 or not 0 <= window_overlap < 1:
            raise InputError(
                f"ramp is a share of the steps and window_overlap one below 1, not {ramp} and {window_overlap}."
            )
        self.class_map, self.balance = classes, balance
        self.consistency = Consistency(targets, threshold, absent)
        self.interval, self.ramp, self.window_overlap = interval, ramp, window_overlap
        self.ignore = ignore
        self._dice: dict[int, tuple[int, list[float]]] = {}
        self.classes: Classes | None = None

    def build(self, classes: Classes, spacing: Tensor, mirrored_class: Tensor, class_weight: Tensor) -> None:
        """Makes the head, once the classes are known: from the data in ``fit``, from the checkpoint afterwards."""
        self.classes = classes
        self.head = nn.Conv3d(self.backbone.out_channels, classes.number, 1).to(self.device)
        self.supervised = DiceCE(class_weight).to(self.device)
        buffers = {
            "class_of_value": classes.class_of_value(),
            "label_values": classes.label_values(),
            "mirrored_class": mirrored_class,
            "spacing": spacing,
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.to(self.device))

    def setup(self, stage: str) -> None:
        """Requests loaders of labelled visits; before training, finds the classes and loads the pretrained weights."""
        data = self.data_source
        data.use_labels(unlabelled_pairs=self.uses("consistency"))
        self.check_channels()
        if stage == "fit":
            super().setup(stage)
            if self.interval is not None and self.uses("consistency"):
                require_intervals(data.table)
            self._learn_classes(data)
            self.start()

    def _learn_classes(self, data: DataSource) -> None:
        train, val = data.labelled_rows("train"), data.labelled_rows("val")
        require_labels(train)
        counts = count_labels(data, train)
        classes = Classes.choose(self.class_map, self.ignore, counts, data.label_names)
        held_out = count_labels(data, val)
        refuse_unknown(classes, held_out, visit_names(data.table, val))
        refuse_empty(classes, held_out)
        mirrored_class = classes.mirrored_class(counts, flips=self.views.flip[0] > 0)
        spacing = torch.tensor(self.working_spacing.mm, dtype=torch.float64)
        self.build(classes, spacing, mirrored_class, classes.weights(counts, self.balance))
        names = list(visit_names(data.table, train).values())
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        ignored = f"; voxels labelled {', '.join(map(str, classes.ignored))} are ignored" if classes.ignored else ""
        many = f"{len(names)} to train ({shown}), {len(val)} to validate"
        rank_zero_info(f"{len(classes.names)} classes; labelled visits: {many}{ignored}.")

    def use_spacing(self, data: DataSource, announce: bool = True) -> None:
        """Also refuses a visit whose grid at this spacing cannot fit into memory."""
        super().use_spacing(data, announce)
        check_visits(data, self.working_spacing.mm or (), self.backbone.in_channels, self.device)

    def losses(self, batch: PairBatch | Mapping[str, PairBatch]) -> dict[str, Tensor]:
        """Terms of ``labelled`` and ``unlabelled`` pairs, or both terms of the same pairs.

        Labelled visits are drawn first, so their crops do not depend on unlabelled pairs. Views without label are
        excluded from the supervised term.
        """
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

    def logits(self, image: Tensor) -> Tensor:
        """``(B, C, ...) → (B, K, ...)``."""
        return self.head(self.backbone(image, output=True)["output"])

    def terms(
        self, first: View, second: View, wanted: Sequence[str] = ("supervised", "consistency")
    ) -> dict[str, Tensor]:
        """The terms of views that are requested and have a weight."""
        maps = [self.head(out).chunk(2) for out in self.backbone.outputs(torch.cat([first.image, second.image]))]
        logits = [(self._unmirrored(one, first), self._unmirrored(other, second)) for one, other in maps]
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
            brought, valid = geo.align(its.detach(), source.affine, view.affine, view.size)
            losses.append(self.consistency(own, brought, valid, weight))
        return (losses[0] + losses[1]) / 2

    def to_class_index(self, label: Tensor) -> Tensor:
        """Classes of label values; -1 where there is no label, background where no class has the value."""
        last = len(self.class_of_value) - 1
        return torch.where(label < last, self.class_of_value[(label.long() + 1).clamp_max(last)], 0)

    def _unmirrored(self, logits: Tensor, view: View) -> Tensor:
        """Swaps left and right classes of mirrored views back to the subject's sides."""
        mirrored = (geo.inverse(view.source_affine) @ view.affine)[:, 0, 0] < 0
        return torch.where(mirrored[:, None, None, None, None], logits[:, self.mirrored_class], logits)

    @property
    def trained_head(self) -> nn.Module:
        """The 1×1×1 convolution."""
        return self.head

    # --- whole visits -------------------------------------------------------------------------------------------------

    def segment(self, image: Tensor, affine: Tensor) -> Tensor:
        """``(D, H, W)`` class of each voxel of a visit ``(C, D, H, W)`` of any spacing."""
        own, window, overlap = geo.spacing(affine), self.views.size, self.window_overlap
        check_memory(image.shape, own.tolist(), self.spacing.tolist(), self.known_classes().number, image.device)
        return segment(image, own, self.spacing, lambda crop: self.logits(crop).float().softmax(1), window, overlap)

    def on_validation_epoch_start(self) -> None:
        """Starts anew."""
        self._dice = {}

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Dice of the structures of a whole visit."""
        truth = self.to_class_index(only_label(batch))
        dice = dice_scores(self._segmented(batch), truth, self.known_classes().number)[1:]
        self._dice[int(batch.session[0, 0])] = int(batch.subject[0]), dice.tolist()

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/dice`` (:func:`.scores.mean_dice`) and ``val/loss`` (1 − Dice), which selects ``best.ckpt``."""
        everyone = every_rank(self._dice)
        dice = mean_dice({row: value for part in everyone for row, value in part.items()})
        self.log_dict({"val/loss": 1 - dice, "val/dice": dice}, prog_bar=True, batch_size=1)

    def test_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Tensor | None]:
        """Prediction and truth of a whole visit, in classes; scored by :class:`.report.SegmentationReport`."""
        truth = None if batch.labels is None else self.to_class_index(only_label(batch))
        return {"predicted": self._segmented(batch), "truth": truth}

    def predict_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Tensor]:
        """Label map of a whole visit; written by :class:`.writer.SegmentationWriter`."""
        return {"label": self.label_values[self._segmented(batch)]}

    def can_test(self, data: DataSource) -> bool:
        """Whether a test visit has a label."""
        return len(data.labelled_rows("test")) > 0

    def on_test_start(self) -> None:
        """Checks the labels of the test visits."""
        data = self.data_source
        if not (data.table["split"] == "test").any():
            raise InputError(f"There are no visits to test on, because of this: {data.summary}")
        if not len(rows := data.labelled_rows("test")):
            raise InputError("No test visit has a label; give labels, or use `lssl predict` to segment without them.")
        refuse_unknown(self.known_classes(), count_labels(data, rows), visit_names(data.table, rows))
        if self.trainer.world_size > 1:
            raise InputError("trainer.devices: the visits of a subject are scored together; test on one device.")

    def configure_callbacks(self) -> list[Callback]:
        """Also scores in ``test``, files in ``predict``."""
        from lssl.segmentation.report import SegmentationReport
        from lssl.segmentation.writer import SegmentationWriter

        return [*super().configure_callbacks(), SegmentationReport(), SegmentationWriter()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The classes, so that prediction needs no labels."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["classes"] = dataclasses.asdict(self.known_classes())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes the head for these weights."""
        if "spacing" in checkpoint["state_dict"]:  # of checkpoints that were written before the run kept it
            checkpoint.setdefault("spacing", checkpoint["state_dict"]["spacing"].tolist())
        super().on_load_checkpoint(checkpoint)
        if "classes" not in checkpoint:
            raise InputError(
                "ckpt_path: not a checkpoint of a Segmenter; give it as model.init_args.pretrained in fit."
            )
        classes = Classes(**checkpoint["classes"])
        if self.classes is None:
            state = checkpoint["state_dict"]
            self.build(classes, state["spacing"], state["mirrored_class"], state["supervised.weight"])
        elif self.classes != classes:
            raise InputError("ckpt_path: it was trained on other classes than the labelled visits hold now.")

    def known_classes(self) -> Classes:
        """The classes; refuses an untrained Segmenter, which has none."""
        if self.classes is None:
            raise InputError("A Segmenter learns its classes in `lssl fit`; give its checkpoint with --ckpt_path.")
        return self.classes

    def _segmented(self, batch: PairBatch) -> Tensor:
        return self.segment(batch.images[0, 0], batch.affines[0, 0])
