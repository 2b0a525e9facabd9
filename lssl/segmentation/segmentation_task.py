"""SegmentationTask: what tasks that segment visits share: classes, whole visits, validation, checkpoints."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.data.few_shot import require_labels
from lssl.data.pairs import visit_names
from lssl.data.previous import Previous
from lssl.data.source import DataSource
from lssl.losses import DiceCE
from lssl.networks.backbone import Backbone
from lssl.segmentation.classes import Classes, count_labels, refuse_empty, refuse_unknown
from lssl.segmentation.fine_tuned import FineTuned
from lssl.segmentation.scores import dice_scores, mean_dice
from lssl.segmentation.volumes import check_visits, later_label
from lssl.utils.distributed import every_rank
from lssl.utils.errors import InputError
from lssl.views import geometry as geo
from lssl.views.sampler import View

__all__ = ["SegmentationTask"]


class SegmentationTask(FineTuned[PairBatch | Mapping[str, PairBatch]]):
    """Classes of the voxels of a visit, the later one of a pair, learned from label maps.

    Args:
        backbone: network; a 1×1×1 convolution maps its output to classes, with deep supervision all of its outputs.
        classes: name → label values; other values are background. ``None`` makes every value in the data a class.
            Classes whose names differ by *left* and *right* (or L and R) are swapped in mirrored views.
        balance: cross-entropy weights are class frequencies to the power minus this; 0 gives equal weights.
        window_overlap: overlap of neighbouring windows in whole visits, as a share of their side.
        ignore: label values of unannotated voxels, which are excluded from losses and scores. ``None``: 255, unless a
            class lists it or it is FreeSurfer's corpus callosum.
        **common: see :class:`.fine_tuned.FineTuned`.
    """

    class_of_value: Tensor
    label_values: Tensor
    mirrored_class: Tensor
    spacing: Tensor

    #: Folder of predictions; ``None`` takes one of the cohort in the run folder.
    results: Path | None

    OWN_TABLE: ClassVar = True

    def __init__(
        self,
        backbone: Backbone,
        classes: dict[str, list[int]] | None = None,
        balance: float = 0.5,
        window_overlap: float = 0.5,
        ignore: list[int] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(backbone, **common)
        if not 0 <= window_overlap < 1:
            raise InputError(f"window_overlap is a share below 1, not {window_overlap}.")
        self.class_map, self.balance, self.window_overlap, self.ignore = classes, balance, window_overlap, ignore
        self.results: Path | None = None
        self._dice: dict[int, tuple[int, list[float]]] = {}
        self.classes: Classes | None = None

    # --- the contract -------------------------------------------------------------------------------------------------

    @abstractmethod
    def segmented(self, batch: PairBatch) -> Tensor:
        """``(D, H, W)`` class of each voxel of the later visit of a batch of one pair."""

    @property
    def previous(self) -> Previous:
        """Whether a visit is segmented with its previous one; if that is required, its label belongs to both."""
        return "no"

    @property
    def head_channels(self) -> int:
        """Channels that the head sees."""
        return self.backbone.out_channels

    # --- classes ------------------------------------------------------------------------------------------------------

    def build(self, classes: Classes, spacing: Tensor, mirrored_class: Tensor, class_weight: Tensor) -> None:
        """Makes the head, once the classes are known: from the data in ``fit``, from the checkpoint afterwards."""
        self.classes = classes
        self.head = nn.Conv3d(self.head_channels, classes.number, 1).to(self.device)
        self.supervised = DiceCE(class_weight).to(self.device)
        buffers = {
            "class_of_value": classes.class_of_value(),
            "label_values": classes.label_values(),
            "mirrored_class": mirrored_class,
            "spacing": spacing,
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.to(self.device))

    @property
    def uses_unlabelled(self) -> bool:
        """Whether training needs unlabelled pairs, too."""
        return False

    def setup(self, stage: str) -> None:
        """Requests loaders of labelled visits; before training, finds the classes and loads the pretrained weights."""
        data = self.data_source
        data.use_labels(unlabelled_pairs=self.uses_unlabelled, previous=self.previous)
        self.check_channels()
        if stage == "fit":
            super().setup(stage)
            self.check_options(data)
            self._learn_classes(data)
            self.start()

    def check_options(self, data: DataSource) -> None:
        """Refuses, before training, options that these data do not allow; does nothing unless overridden."""

    def _learn_classes(self, data: DataSource) -> None:
        train, val = data.labelled_rows("train"), data.labelled_rows("val")
        require_labels(train)
        counts = count_labels(data, train)
        classes = Classes.choose(self.class_map, self.ignore, counts, data.label_names)
        held_out = count_labels(data, val)
        refuse_unknown(classes, held_out, visit_names(data.table, val))
        refuse_empty(classes, held_out)
        sides = None if self.previous == "required" else counts  # what has changed may lie on one side of a few brains
        mirrored_class = classes.mirrored_class(sides, flips=self.views.flip[0] > 0)
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

    def require_aligned(self, what: str) -> None:
        """Refuses views that show two visits at different places.

        Args:
            what: needs them, as the beginning of a sentence.
        """
        if self.views.geometry != "aligned" or self.views.same_visit:
            raise InputError(
                f"views: {what} where both views show two visits at one place; set views.geometry to aligned and "
                f"views.same_visit to 0."
            )

    def check_both_channels(self, option: str, instead: str) -> None:
        """Refuses a network that does not take the channels of two visits.

        Args:
            option: that shows it both.
            instead: another setting.
        """
        names, taken = self.data_source.channels(), self.backbone.in_channels
        if 2 * len(names) != taken:
            raise InputError(
                f"{option} shows the network both visits as channels, two times {len(names)} ({', '.join(names)}), and "
                f"it takes {taken}: set backbone.in_channels (and the network's own option, if it is given by "
                f"class_path) to {2 * len(names)}, or {instead}."
            )

    def to_class_index(self, label: Tensor) -> Tensor:
        """Classes of label values; -1 where there is no label, background where no class has the value."""
        last = len(self.class_of_value) - 1
        return torch.where(label < last, self.class_of_value[(label.long() + 1).clamp_max(last)], 0)

    def unmirrored(self, logits: Tensor, view: View) -> Tensor:
        """Swaps left and right classes of mirrored views back to the subject's sides."""
        mirrored = (geo.inverse(view.source_affine) @ view.affine)[:, 0, 0] < 0
        return torch.where(mirrored[:, None, None, None, None], logits[:, self.mirrored_class], logits)

    @property
    def trained_head(self) -> nn.Module:
        """The 1×1×1 convolution."""
        return self.head

    # --- whole visits -------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Starts anew."""
        self._dice = {}

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Dice of the structures of a whole visit."""
        truth = self.to_class_index(later_label(batch))
        dice = dice_scores(self.segmented(batch), truth, self.known_classes().number)[1:]
        self._dice[int(batch.session[0, 1])] = int(batch.subject[0]), dice.tolist()

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/dice`` (:func:`.scores.mean_dice`) and ``val/loss`` (1 − Dice), which selects ``best.ckpt``."""
        everyone = every_rank(self._dice)
        dice = mean_dice({row: value for part in everyone for row, value in part.items()})
        self.log_dict({"val/loss": 1 - dice, "val/dice": dice}, prog_bar=True, batch_size=1)

    def test_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Tensor | None]:
        """Prediction and truth of a whole visit, in classes; scored by the task's report."""
        truth = None if batch.labels is None else self.to_class_index(later_label(batch))
        return {"predicted": self.segmented(batch), "truth": truth}

    def predict_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Tensor]:
        """Label map of a whole visit; written by the task's writer."""
        return {"label": self.label_values[self.segmented(batch)]}

    def can_test(self, data: DataSource) -> bool:
        """Whether a test visit has a label."""
        return len(data.labelled_rows("test")) > 0

    def on_test_start(self) -> None:
        """Checks the labels of the test visits."""
        data = self.data_source
        if not (data.table["split"] == "test").any():
            raise InputError(f"There are no visits to test on, because of this: {data.summary}")
        if not len(rows := data.labelled_rows("test")):
            what = "label and an earlier visit" if self.previous == "required" else "label"
            raise InputError(f"No test visit has a {what}; give labels, or use `lssl predict` to segment without them.")
        refuse_unknown(self.known_classes(), count_labels(data, rows), visit_names(data.table, rows))
        if self.trainer.world_size > 1:
            raise InputError("trainer.devices: the visits of a subject are scored together; test on one device.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The classes, so that prediction needs no labels."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["classes"] = dataclasses.asdict(self.known_classes())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes the head for these weights."""
        if "spacing" in checkpoint.get("state_dict", {}):  # of checkpoints that were written before the run kept it
            checkpoint.setdefault("spacing", checkpoint["state_dict"]["spacing"].tolist())
        super().on_load_checkpoint(checkpoint)
        if "classes" not in checkpoint or ("combine" in checkpoint) != (self.previous == "required"):
            raise InputError(
                f"ckpt_path: not a checkpoint of a {type(self).__name__}; give it as model.init_args.pretrained in fit."
            )
        classes = Classes(**checkpoint["classes"])
        if self.classes is None:
            state = checkpoint["state_dict"]
            self.build(classes, state["spacing"], state["mirrored_class"], state["supervised.weight"])
        elif self.classes != classes:
            raise InputError("ckpt_path: it was trained on other classes than the labelled visits hold now.")

    def known_classes(self) -> Classes:
        """The classes; refuses an untrained task, which has none."""
        if self.classes is None:
            name = type(self).__name__
            raise InputError(f"A {name} learns its classes in `lssl fit`; give its checkpoint with --ckpt_path.")
        return self.classes
