"""Voxels of one structure attract one another and repel all others: supervised contrast, for data with many labels.

Made for the endless stream of synthetic brains, whose labels cost nothing; the idea is that of anatomix (Dey, Billot,
Wong, Wang, Ren, Grant, Dalca, Golland: "Learning General-purpose Biomedical Volume Representations using Randomized
Synthesis", ICLR 2025, arXiv 2411.02372). The paper's text was not available: the loss is the one of Khosla et al.
(NeurIPS 2020), and points, taps and heads are those of our own dense InfoNCE.

At K corresponding voxels of each of T taps, z is the projection of both views' features there, and y the label of each
view at its own voxel:

======== =========================================================================================== ======
term     formula                                                                                     weight
======== =========================================================================================== ======
contrast Σ_l w_l L_l, Σ w_l = 1, with L_l the supervised contrast of the 2 K points of a pair        1
         (:class:`lssl.losses.SupervisedContrast`)
======== =========================================================================================== ======

Anatomy, contrast and time differ between the views, and the label is what they share. A pair whose visits have no
label, or no label twice, is left out; the log gives the share of pairs without labels (``skipped``). Unlike dense
InfoNCE, places within a structure are not told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lssl.data.batch import PairBatch
from lssl.losses import SupervisedContrast
from lssl.networks.backbone import Backbone
from lssl.networks.heads import StackedHeads, feature_std
from lssl.strategy import Strategy
from lssl.utils.errors import InputError
from lssl.utils.random import host_generator
from lssl.utils.transfer import send
from lssl.views import affines as algebra
from lssl.views.points import at_grid, plan_points, sampling_grids
from lssl.views.sampler import View
from lssl.views.view import Placement

__all__ = ["LabelContrast"]


class LabelContrast(Strategy):
    """Contrast of voxels by their labels, at several scales (after anatomix, Dey et al., ICLR 2025).

    Args:
        backbone: network and taps.
        taps: taps that are compared; of a stride that resolves the structures.
        tap_weights: weight of each tap, normalised to sum 1; ``None`` weighs all alike.
        temperature: of the soft-max.
        samples: number of corresponding voxels per tap and pair (K).
        foreground: draw voxels from the foreground only.
        hidden: width of the projectors' hidden layer.
        projection: width of z.
        **common: see :class:`lssl.task.Task`.
    """

    shares: Tensor

    LOSS_WEIGHTS: ClassVar = {"contrast": 1.0}

    def __init__(
        self,
        backbone: Backbone,
        taps: Sequence[str] = ("decoder.2", "decoder.1", "decoder.0"),
        tap_weights: dict[str, float] | None = None,
        temperature: float = 0.1,
        samples: int = 256,
        foreground: bool = True,
        hidden: int = 128,
        projection: int = 64,
        **common: Any,
    ) -> None:
        super().__init__(backbone, **common)
        weights = backbone.normalised_weights(taps, tap_weights)
        self.taps, self.samples, self.foreground = list(weights), samples, foreground
        self.register_buffer("shares", torch.tensor(list(weights.values())), persistent=False)
        backbone.freeze_unused(self.taps)
        self.projectors = StackedHeads({tap: backbone.taps[tap].channels for tap in self.taps}, hidden, projection)
        self.loss = SupervisedContrast(temperature)

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """See the module's table."""
        if first.source_label is None or second.source_label is None:
            raise InputError(
                "LabelContrast compares voxels by their labels, and no visit of the batch has a label map; give "
                "labels, or take LongitudinalLocal, which needs none."
            )
        features = self.backbone(torch.cat([first.image, second.image]), self.taps)
        views, taps = (first.host, second.host), [self.backbone.taps[tap] for tap in self.taps]
        points = plan_points(*views, taps, self.samples, host_generator(self.generator), self.foreground)
        planned = [points.weight, sampling_grids(views, taps, points.places), _source_voxels(views, points.places)]
        weight, grid, voxels = send(planned, first.image.device)
        rows = [at_grid(features[tap], grid[n].flatten(0, 1)) for n, tap in enumerate(self.taps)]
        z = self.projectors(rows).unflatten(1, (2, len(batch), -1))  # (T, 2, B, K, D)
        self.log_metric("feature_std", feature_std(z.flatten(1, 3)))
        labels = torch.stack([first.source_label, second.source_label]).flatten(2)
        label = labels.gather(2, voxels).unflatten(2, (len(taps), -1)).permute(2, 1, 0, 3).flatten(2)  # (T, B, 2 K)
        self.log_metric("skipped", (label < 0).all(2).float().mean())
        return {"contrast": (self.shares * self.loss(z.transpose(1, 2).flatten(2, 3), label, weight)).sum()}


def _source_voxels(views: Sequence[Placement], places: np.ndarray) -> np.ndarray:
    """The voxels of each view's source nearest to points ``(T, V or 1, B, K, 3)``: flat indices ``(2, B, T K)``."""
    found = []
    for number, view in enumerate(views):
        points = np.concatenate(list(places[:, min(number, places.shape[1] - 1)]), 1)  # (B, T K, 3)
        sides = view.source_foreground.shape[1:]
        voxel = np.rint(algebra.transform(algebra.inverse(view.source_affine), points)).astype(np.int64)
        i, j, k = np.moveaxis(voxel.clip(0, np.array(sides) - 1), -1, 0)
        found.append((i * sides[1] + j) * sides[2] + k)
    return np.stack(found)
