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
from lssl.networks.heads import Projector, TapHeads, feature_std
from lssl.networks.initialise import published_init
from lssl.strategy import Strategy
from lssl.utils.distributed import gather
from lssl.utils.errors import InputError
from lssl.views.points import at_points, corresponding_points
from lssl.views.sampler import View

__all__ = ["Cosine", "InfoNCE", "LongitudinalLocal", "Objective"]

Views = tuple[Tensor, ...]
"""The same of both views."""


class Objective(nn.Module, ABC):
    """Makes corresponding voxels of two views similar."""

    #: Whether the projectors normalise their output.
    normalises: ClassVar[bool] = False

    def predictor(self, width: int) -> nn.Module | None:
        """A new head of this width from ``z`` to the other view's ``z``; ``None`` if the objective has none."""
        return None

    @abstractmethod
    def forward(self, z: Views, p: Views, points_mm: Tensor, weight: Tensor) -> Tensor:
        """Loss of one tap.

        Args:
            z: projections ``(B, K, D)`` of both views at K corresponding voxels.
            p: predictions from them, or ``z`` itself without a predictor.
            points_mm: ``(B, K, 3)`` positions of the voxels in mm.
            weight: ``(B,)`` share of each pair in the mean.
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

    def predictor(self, width: int) -> nn.Module:
        """A head of two layers."""
        return Projector(width, self.predictor_hidden, width)

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
        norm, layers = self.objective.normalises, projector_layers
        self.projectors = TapHeads(
            {
                tap: Projector(backbone.taps[tap].channels, hidden, projection, layers, last_norm=norm)
                for tap in (self.compared if self.raw_orthogonality else self.taps)
            }
        )
        predictors = {tap: self.objective.predictor(projection) for tap in self.taps_of({"similarity": self.compared})}
        self.predictors = TapHeads({tap: head for tap, head in predictors.items() if head is not None})
        if self.uses("reconstruction"):
            self.to_image = nn.Conv3d(
                backbone.out_channels, backbone.in_channels, 3, padding=1, bias=False, padding_mode=backbone.padding
            )
        self.variance, self.covariance, self.orthogonality = Variance(), Covariance(), Orthogonality()
        if init == "published":
            self.apply(published_init)

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """See the module's table."""
        images = torch.cat([first.image, second.image])
        features = self.backbone(images, self.taps, output=self.uses("reconstruction"))
        zero = images.new_zeros(())
        terms: dict[str, Tensor] = {}
        drawn, projected, stds = {}, {}, []
        for tap in self.compared:
            drawn[tap] = points_mm, weight = self._draw(first, second, tap)
            z = projected[tap] = self._project(tap, features[tap], first, second, points_mm)
            stds.append(feature_std(torch.cat(z).flatten(0, 1)))
            share = self.tap_weights[tap]
            if self.uses("similarity"):
                p = self.predictors.rows(tap, torch.cat(z)).chunk(2) if tap in self.predictors else z
                similarity = self.objective(z, p, points_mm, weight)
                terms["similarity"] = terms.get("similarity", zero) + share * similarity
            if tap in self.regularised:
                for name, value in self._spread(z, weight).items():
                    terms[name] = terms.get(name, zero) + share * value
        if stds:
            self.log_metric("feature_std", torch.stack(stds).mean())
        if self.uses("orthogonality"):
            terms["orthogonality"] = self._orthogonality(features, first, second, drawn, projected)
        if self.uses("reconstruction"):
            clean = torch.cat([first.clean, second.clean])
            terms["reconstruction"] = F.mse_loss(self.to_image(features["output"]).float(), clean)
        return terms

    def show_reconstruction(self, view: View) -> tuple[Tensor, Tensor] | None:
        """The network's output, as the reconstruction term compares it with the clean view."""
        if not self.uses("reconstruction"):
            return None
        return view.image, self.to_image(self.backbone(view.image, output=True)["output"])

    def _spread(self, z: Views, weight: Tensor) -> dict[str, Tensor]:
        """Variance and covariance over the rows of all ranks; pairs without a shared point are left out."""
        losses = {"variance": self.variance, "covariance": self.covariance}
        if not any(map(self.uses, losses)):
            return {}
        rows = [gather(side.flatten(0, 1)) for side in z]
        used = gather(weight[:, None].expand(z[0].shape[:2]).flatten())
        return {name: loss(*rows, used, used) for name, loss in losses.items() if self.uses(name)}

    def _orthogonality(
        self, features: dict[str, Tensor], first: View, second: View, drawn: dict, projected: dict
    ) -> Tensor:
        """Compares encoder and decoder at the same voxels of the same visit."""
        skip, decoder = self.orthogonal_taps
        points_mm, weight = drawn[decoder] if decoder in drawn else self._draw(first, second, decoder)
        if self.raw_orthogonality:
            pair = [self._gather(tap, features[tap], first, second, points_mm) for tap in (skip, decoder)]
        else:
            pair = [self._project(skip, features[skip], first, second, points_mm)]
            pair.append(projected.get(decoder) or self._project(decoder, features[decoder], first, second, points_mm))
        return self.orthogonality(*(torch.cat(both) for both in pair), weight.repeat(2))

    def _draw(self, first: View, second: View, tap: str) -> tuple[Tensor, Tensor]:
        """Points in mm of corresponding voxels, and weights of the pairs."""
        where = self.backbone.taps[tap]
        return corresponding_points(first, second, where, self.samples, self.generator, self.foreground)

    def _gather(self, tap: str, features: Tensor, first: View, second: View, points_mm: Tensor) -> Views:
        one, two = features.chunk(2)
        where = self.backbone.taps[tap]
        return at_points(one, first, where, points_mm), at_points(two, second, where, points_mm)

    def _project(self, tap: str, features: Tensor, first: View, second: View, points_mm: Tensor) -> Views:
        """``z`` of both views ``(B, K, D)``; the heads' statistics pool over both, as published."""
        rows = torch.cat(self._gather(tap, features, first, second, points_mm))
        z1, z2 = self.projectors.rows(tap, rows).chunk(2)
        return z1, z2

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
