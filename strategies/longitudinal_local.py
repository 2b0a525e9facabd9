"""Longitudinal local multi-scale pretraining.

Ren, Dey, Styner, Botteron, Gerig: "Local Spatiotemporal Representation Learning for Longitudinally-consistent
Neuroimage Analysis", NeurIPS 2022 (arXiv 2206.04281). The paper's text was not available when this was written. Terms
and defaults follow the authors' published code; every departure from it is an option.

One network sees two visits A, B of a subject. At K corresponding voxels of several encoder and decoder taps, h is the
feature, z = projector(h) and p = predictor(z):

=============== ============================================================================================= ========
term            formula                                                                                       weight
=============== ============================================================================================= ========
similarity      Σ_l w_l L_l, Σ w_l = 1, with L_l = ½ mean[-cos(p_A, sg z_B)] + ½ mean[-cos(p_B, sg z_A)]      1
variance        Σ_{l in decoder} w_l V_l, V = ½ Σ_visits mean_d max(0, 1 - sd_d(z))                           0.001
covariance      Σ_{l in decoder} w_l C_l, C = Σ_visits (1/D) Σ_{i≠j} Cov(z)_ij²                               0.001
orthogonality   mean cos²(z_skip, z_decoder) at the first concatenation after the bottleneck, same visit      100
reconstruction  mean over visits of MSE(3³ convolution of the network's output, view before intensity change) 10
=============== ============================================================================================= ========

What each part is for:

* The predictor and the stopped gradient keep features from becoming constant.
* Variance and covariance keep the decoder's channels from dying or repeating each other.
* Orthogonality keeps the decoder from merely passing on the skip connection's features.
* Reconstruction keeps the image in the output.

Known weaknesses of the published settings, and the options against them:

* A projector that no other term uses can satisfy projected orthogonality alone; the backbone need not change
  (``orthogonality = "raw"``).
* With K < D the covariance cannot come near 0 (more ``samples`` or a smaller ``projection``).
* With views of one window and zero padding, the network can match voxels by their position in the crop (views with
  independent geometry, or a reflect-padded backbone).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.losses import Covariance, DenseInfoNCE, NegativeCosine, Orthogonality, Variance
from lssl.networks.backbone import Backbone
from lssl.networks.heads import StackedHeads, feature_std
from lssl.networks.initialise import published_init
from lssl.strategy import Strategy
from lssl.utils.distributed import gather
from lssl.utils.errors import InputError
from lssl.utils.random import host_generator
from lssl.utils.transfer import send
from lssl.views.points import at_grid, plan_points, sampling_grids
from lssl.views.sampler import View

__all__ = ["Cosine", "InfoNCE", "LongitudinalLocal", "Objective"]

Views = tuple[Tensor, ...]
"""The same of both views."""


class Objective(nn.Module, ABC):
    """Makes corresponding voxels of two views similar, at T taps at once."""

    #: Whether the projectors normalise their output.
    normalises: ClassVar[bool] = False

    def predictors(self, taps: Sequence[str], width: int) -> StackedHeads | None:
        """New heads of this width from ``z`` to the other view's ``z``; ``None`` if the objective has none."""
        return None

    @abstractmethod
    def forward(self, z: Views, p: Views, points_mm: Tensor, weight: Tensor) -> Tensor:
        """Losses ``(T,)`` of the taps.

        Args:
            z: projections ``(T, B, K, D)`` of both views at K corresponding voxels.
            p: predictions from them, or ``z`` itself without a predictor.
            points_mm: ``(T, B, K, 3)`` positions of the voxels in mm.
            weight: ``(T, B)`` share of each pair in the mean.
        """


class Cosine(Objective):
    """Predicts the other view's projection, which gets no gradient (SimSiam), as published.

    Args:
        predictor_hidden: width of the predictors' hidden layer.
    """

    normalises = True

    def __init__(self, predictor_hidden: int = 512) -> None:
        super().__init__()
        self.predictor_hidden, self.loss = predictor_hidden, NegativeCosine()

    def predictors(self, taps: Sequence[str], width: int) -> StackedHeads:
        """Heads of two layers."""
        return StackedHeads(dict.fromkeys(taps, width), self.predictor_hidden, width)

    def forward(self, z: Views, p: Views, points_mm: Tensor, weight: Tensor) -> Tensor:
        """See :class:`lssl.losses.NegativeCosine`."""
        return self.loss(p[0], z[0], p[1], z[1], weight)


class InfoNCE(Objective):
    """Discriminates each voxel from voxels farther away in the other view; no predictor.

    Args:
        temperature: temperature of the soft-max.
        exclusion: radius in mm around a voxel; nothing inside it is a negative.
    """

    def __init__(self, temperature: float = 0.1, exclusion: float = 8.0) -> None:
        super().__init__()
        self.loss = DenseInfoNCE(temperature, exclusion)

    def forward(self, z: Views, p: Views, points_mm: Tensor, weight: Tensor) -> Tensor:
        """See :class:`lssl.losses.DenseInfoNCE`."""
        return self.loss(*z, points_mm, weight)


class LongitudinalLocal(Strategy):
    """Similarity of corresponding voxels of two visits at several scales (Ren et al., NeurIPS 2022).

    Args:
        backbone: network and taps.
        encoder_taps: taps with a similarity term.
        decoder_taps: taps with similarity, variance and covariance terms.
        tap_weights: similarity weight of each tap, normalised to sum 1; ``None`` weighs all alike.
        orthogonal_taps: encoder tap of the skip connection and the decoder tap after it; both have the same stride.
        orthogonality: compare these taps ``projected``, as published, or ``raw`` (needs equally many channels).
        objective: objective of the similarity: Cosine (as published), InfoNCE, or another :class:`Objective`.
        samples: number of corresponding voxels per tap and pair (K).
        foreground: draw voxels from the foreground only. The published code draws them anywhere, air included.
        hidden: width of the projectors' hidden layers.
        projection: width of z (D).
        projector_layers: number of Linear layers of a projector.
        init: initial weights of network and heads: torch's, or ``published``
            (:func:`lssl.networks.initialise.published_init`).
        **common: see :class:`lssl.task.Task`. A term of weight 0 gets no head.
    """

    shares: Tensor
    regularised_shares: Tensor

    LOSS_WEIGHTS: ClassVar = {
        "similarity": 1.0,
        "variance": 1e-3,
        "covariance": 1e-3,
        "orthogonality": 100.0,
        "reconstruction": 10.0,
    }

    def __init__(
        self,
        backbone: Backbone,
        encoder_taps: Sequence[str] = ("encoder.0", "encoder.1", "encoder.2", "encoder.3", "bottleneck"),
        decoder_taps: Sequence[str] = ("decoder.3", "decoder.2", "decoder.1"),
        tap_weights: dict[str, float] | None = None,
        orthogonal_taps: tuple[str, str] = ("skip.3", "decoder.3"),
        orthogonality: Literal["projected", "raw"] = "projected",
        objective: Callable[[], Objective] = Cosine,
        samples: int = 128,
        foreground: bool = False,
        hidden: int = 2048,
        projection: int = 2048,
        projector_layers: int = 3,
        init: Literal["torch", "published"] = "torch",
        **common: Any,
    ) -> None:
        super().__init__(backbone, **common)
        self.objective = objective()
        self.tap_weights = backbone.normalised_weights([*encoder_taps, *decoder_taps], tap_weights)
        self.regularised = [tap for tap in self.tap_weights if tap in decoder_taps]
        self.orthogonal_taps, self.raw_orthogonality = tuple(orthogonal_taps), orthogonality == "raw"
        self.samples, self.foreground = samples, foreground
        if self.uses("orthogonality"):
            self._check_orthogonal()
        needs = {"similarity": self.tap_weights, "variance": self.regularised, "covariance": self.regularised}
        self.compared = self.taps_of(needs)
        self.taps = self.taps_of({**needs, "orthogonality": self.orthogonal_taps})
        backbone.freeze_unused(self.taps, output=self.uses("reconstruction"))
        headed = self.compared if self.raw_orthogonality else self.taps
        channels = {tap: backbone.taps[tap].channels for tap in headed}
        last_norm = self.objective.normalises
        self.projectors = StackedHeads(channels, hidden, projection, projector_layers, last_norm)
        self.predictors: StackedHeads | None = None
        if self.uses("similarity"):
            self.predictors = self.objective.predictors(self.compared, projection)
        for name, taps in (("shares", self.compared), ("regularised_shares", self.regularised)):
            shares = torch.tensor([self.tap_weights[tap] for tap in taps])
            self.register_buffer(name, shares, persistent=False)
        if self.uses("reconstruction"):
            self.to_image = nn.Conv3d(
                backbone.out_channels, backbone.in_channels, 3, padding=1, bias=False, padding_mode=backbone.padding
            )
        self.regularisers = nn.ModuleDict({"variance": Variance(), "covariance": Covariance()})
        self.orthogonality = Orthogonality()
        if init == "published":
            self.apply(published_init)

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """See the module's table."""
        images = torch.cat([first.image, second.image])
        features = self.backbone(images, self.taps, output=self.uses("reconstruction"))
        terms: dict[str, Tensor] = {}
        if self.taps:
            points_mm, weight, rows = self._gather(features, first, second)
            z = self._project(rows)
            if self.compared:
                terms |= self._compare(z[: len(self.compared)], points_mm, weight)
            if self.uses("orthogonality"):
                terms["orthogonality"] = self._orthogonality(z, rows, weight)
        if self.uses("reconstruction"):
            clean = torch.cat([first.clean, second.clean])
            terms["reconstruction"] = F.mse_loss(self.to_image(features["output"]).float(), clean)
        return terms

    def show_reconstruction(self, view: View) -> tuple[Tensor, Tensor] | None:
        """The network's output, as the reconstruction term compares it with the clean view."""
        if not self.uses("reconstruction"):
            return None
        return view.image, self.to_image(self.backbone(view.image, output=True)["output"])

    def _compare(self, z: Tensor, points_mm: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Similarity, variance and covariance."""
        self.log_metric("feature_std", feature_std(z.flatten(1, 3)))
        points_mm, weight = points_mm[: len(z)], weight[: len(z)]
        terms = {}
        if self.uses("similarity"):
            p = z if self.predictors is None else self._predict(z)
            terms["similarity"] = (self.shares * self.objective(z.unbind(1), p.unbind(1), points_mm, weight)).sum()
        return terms | self._spread(z, weight)

    def _gather(self, features: dict[str, Tensor], first: View, second: View) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Points in mm ``(T, B, K, 3)`` and weights ``(T, B)`` of all taps, and features ``(2 B, K, C)`` of each tap.

        The skip connection is read at the decoder's voxels: orthogonality compares them.
        """
        taps = [self.backbone.taps[tap] for tap in self.taps]
        drawn = list(self.taps)
        if self.uses("orthogonality"):
            skip, decoder = self.orthogonal_taps
            drawn = [decoder if tap == skip else tap for tap in drawn]
        kinds = list(dict.fromkeys(drawn))
        draws, views = host_generator(self.generator), (first.host, second.host)
        lattices = [self.backbone.taps[tap] for tap in kinds]
        points = plan_points(*views, lattices, self.samples, draws, self.foreground)
        place = [kinds.index(tap) for tap in drawn]
        mm, weight = points.mm[place], points.weight[place]
        grids = sampling_grids(views, taps, points.places[place])
        points_mm, weights, grid = send([mm, weight, grids], first.image.device)
        return points_mm, weights, [at_grid(features[tap], grid[n].flatten(0, 1)) for n, tap in enumerate(self.taps)]

    def _project(self, rows: list[Tensor]) -> Tensor:
        """``z (T, 2, B, K, D)``; the heads' statistics pool over both views, as published."""
        if not len(self.projectors):
            return rows[0].new_zeros(0)
        return self.projectors(rows[: len(self.projectors)]).unflatten(1, (2, -1, rows[0].shape[1]))

    def _predict(self, z: Tensor) -> Tensor:
        """``p`` of the same shape."""
        assert self.predictors is not None
        return self.predictors(z.flatten(1, 3)).unflatten(1, z.shape[1:4])

    def _spread(self, z: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Variance and covariance over the rows of all ranks; pairs without a shared point are left out."""
        losses = {name: loss for name, loss in self.regularisers.items() if self.uses(name)}
        if not losses or not self.regularised:
            return {}
        places = [self.compared.index(tap) for tap in self.regularised]
        sides = torch.stack([z[place] for place in places], 3).unbind(0)  # (B, K, T, D) of either view
        rows = [gather(side.flatten(0, 1)).transpose(0, 1) for side in sides]
        counted = torch.stack([weight[place] for place in places], 1)[:, None].expand(-1, z.shape[3], -1)
        used = gather(counted.flatten(0, 1)).transpose(0, 1)
        return {name: (self.regularised_shares * loss(*rows, used, used)).sum() for name, loss in losses.items()}

    def _orthogonality(self, z: Tensor, rows: list[Tensor], weight: Tensor) -> Tensor:
        """Compares encoder and decoder at the same voxels of the same visit."""
        skip, decoder = (self.taps.index(tap) for tap in self.orthogonal_taps)
        pair = [rows[n] if self.raw_orthogonality else z[n].flatten(0, 1) for n in (skip, decoder)]
        return self.orthogonality(*pair, weight[decoder].repeat(2))

    def _check_orthogonal(self) -> None:
        self.backbone.check_taps(self.orthogonal_taps)
        skip, decoder = (self.backbone.taps[tap] for tap in self.orthogonal_taps)
        if skip.stride != decoder.stride:
            raise InputError(f"orthogonal_taps: {' and '.join(self.orthogonal_taps)} have different strides.")
        if self.raw_orthogonality and skip.channels != decoder.channels:
            raise InputError(
                f"orthogonal_taps: raw features need equally many channels, but {self.orthogonal_taps[0]} has "
                f"{skip.channels} and {self.orthogonal_taps[1]} has {decoder.channels}."
            )
