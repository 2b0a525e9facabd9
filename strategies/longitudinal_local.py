"""Longitudinal local multi-scale pretraining.

Ren, Dey, Styner, Botteron, Gerig: "Local Spatiotemporal Representation Learning for Longitudinally-consistent
Neuroimage Analysis", NeurIPS 2022 (arXiv 2206.04281). The paper's text could not be had when this was written; terms
and defaults follow the authors' published code, and each departure from it is an option.

Two visits A, B of one subject pass one network. At K corresponding voxels of several encoder and decoder taps, h is
the feature, z = projector(h) and p = predictor(z):

=============== ============================================================================================= ========
term            formula                                                                                       weight
=============== ============================================================================================= ========
similarity      Σ_l w_l L_l, Σ w_l = 1, with L_l = ½ mean[-cos(p_A, sg z_B)] + ½ mean[-cos(p_B, sg z_A)]      1
variance        Σ_{l in decoder} w_l V_l, V = ½ Σ_visits mean_d max(0, 1 - sd_d(z))                           0.001
covariance      Σ_{l in decoder} w_l C_l, C = Σ_visits (1/D) Σ_{i≠j} Cov(z)_ij²                               0.001
orthogonality   mean cos²(z_skip, z_decoder) at the first concatenation after the bottleneck, same visit      100
reconstruction  mean over visits of MSE(3³ convolution of the network's output, view before intensity change) 10
=============== ============================================================================================= ========

What the terms are for: the predictor and the stopped gradient keep features from becoming constant, variance and
covariance the decoder's channels from dying or repeating each other, orthogonality the decoder from passing on what
the skip connection gave it, and reconstruction the image in the output.

Known of the published settings (see the options that mend it): projected orthogonality is met by turning a projector
that no other term holds, the backbone need not change (``orthogonality = "raw"``); with K < D the covariance cannot
come near 0; and views cut at one window with zero padding let the network match voxels by their place in the crop
(views with independent geometry, or a reflect-padded backbone).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.losses import Covariance, DenseInfoNCE, NegativeCosine, Orthogonality, Variance
from lssl.networks.backbone import Backbone
from lssl.networks.heads import Projector
from lssl.strategy import Strategy
from lssl.utils.errors import InputError
from lssl.views.points import at_points, corresponding_points
from lssl.views.sampler import View

__all__ = ["LongitudinalLocal"]


class LongitudinalLocal(Strategy):
    """Similarity of corresponding voxels of two visits at several scales (Ren et al., NeurIPS 2022).

    Args:
        backbone: network and taps.
        encoder_taps: taps with a similarity term.
        decoder_taps: taps with similarity, variance and covariance terms.
        tap_weights: similarity weight of each tap, normalised to sum 1; ``None`` weighs all alike.
        orthogonal_taps: encoder tap of the skip connection, and the decoder tap after it; same stride.
        orthogonality: compare them ``projected``, as published, or ``raw`` (needs equally many channels).
        objective: ``cosine`` with predictor and stop-gradient, as published, or ``info_nce``: each voxel against
            those farther than ``exclusion`` mm in the other view, without predictor.
        samples: corresponding voxels per tap and pair (K).
        foreground: draw them from the foreground only (published: anywhere, air included).
        hidden: width of the projectors' hidden layers.
        projection: width of z (D).
        projector_layers: Linear layers of a projector.
        bottleneck: hidden width of the predictors.
        temperature: of ``info_nce``.
        exclusion: mm around a voxel within which ``info_nce`` takes no negatives.
        weights: term → weight; 0 switches a term off and builds no head for it.
        **common: see :class:`lssl.strategy.Strategy`.
    """

    TERMS = ("similarity", "variance", "covariance", "orthogonality", "reconstruction")
    WEIGHTS: ClassVar = {
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
        objective: Literal["cosine", "info_nce"] = "cosine",
        samples: int = 128,
        foreground: bool = False,
        hidden: int = 2048,
        projection: int = 2048,
        projector_layers: int = 3,
        bottleneck: int = 512,
        temperature: float = 0.1,
        exclusion: float = 8.0,
        weights: dict[str, float] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(backbone, weights={**self.WEIGHTS, **(weights or {})}, **common)
        self.decoder_taps, self.orthogonal_taps = tuple(decoder_taps), tuple(orthogonal_taps)
        self.tap_weights = backbone.shares([*encoder_taps, *decoder_taps], tap_weights)
        self.raw_orthogonality = orthogonality == "raw"
        self.objective, self.samples, self.foreground = objective, samples, foreground
        if self.uses("orthogonality"):
            self._check_orthogonal()
        backbone.freeze_unused(self._all_taps(), output=self.uses("reconstruction"))
        self.projectors, self.predictors = nn.ModuleDict(), nn.ModuleDict()
        for tap in self._projected_taps():
            channels = backbone.taps[tap].channels
            self.projectors[_key(tap)] = Projector(
                channels, hidden, projection, projector_layers, last_norm=objective == "cosine"
            )
        if self.uses("similarity") and objective == "cosine":
            for tap in self.tap_weights:
                self.predictors[_key(tap)] = Projector(projection, bottleneck, projection)
        if self.uses("reconstruction"):
            self.reconstruct = nn.Conv3d(
                backbone.out_channels, backbone.in_channels, 3, padding=1, bias=False, padding_mode=backbone.padding
            )
        self.cosine, self.info_nce = NegativeCosine(), DenseInfoNCE(temperature, exclusion)
        self.variance, self.covariance, self.orthogonality = Variance(), Covariance(), Orthogonality()

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """See the module's table."""
        images = torch.cat([first.image, second.image])
        features = self.backbone(images, self._all_taps(), output=self.uses("reconstruction"))
        terms: dict[str, Tensor] = {}
        drawn, projected = {}, {}
        zero = images.new_zeros(())
        for tap in self._compared_taps():
            drawn[tap], weight = self._points(first, second, tap)
            z1, z2 = projected[tap] = self._project(tap, features[tap], first, second, drawn[tap])
            share = self.tap_weights[tap]
            if self.uses("similarity"):
                similarity = self._similarity(tap, z1, z2, drawn[tap], weight)
                terms["similarity"] = terms.get("similarity", zero) + share * similarity
            if tap in self.decoder_taps:
                for name, loss in (("variance", self.variance), ("covariance", self.covariance)):
                    if self.uses(name):
                        terms[name] = terms.get(name, zero) + share * loss(z1.flatten(0, 1), z2.flatten(0, 1))
        if self.uses("orthogonality"):
            terms["orthogonality"] = self._orthogonality(features, first, second, drawn, projected)
        if self.uses("reconstruction"):
            clean = torch.cat([first.clean, second.clean])
            terms["reconstruction"] = F.mse_loss(self.reconstruct(features["output"]).float(), clean)
        return terms

    def reconstruction(self, view: View) -> tuple[Tensor, Tensor] | None:
        """The network's output, as the reconstruction term compares it with the clean view."""
        if not self.uses("reconstruction"):
            return None
        return view.image, self.reconstruct(self.backbone(view.image, output=True)["output"])

    def _similarity(self, tap: str, z1: Tensor, z2: Tensor, places: Tensor, weight: Tensor) -> Tensor:
        if self.objective == "info_nce":
            return self.info_nce(z1, z2, places, weight)
        p1, p2 = _rows(self.predictors[_key(tap)], torch.cat([z1, z2])).chunk(2)
        return self.cosine(p1, z1, p2, z2, weight)

    def _orthogonality(
        self, features: dict[str, Tensor], first: View, second: View, drawn: dict, projected: dict
    ) -> Tensor:
        """Encoder against decoder at the same voxels of the same visit."""
        skip, decoder = self.orthogonal_taps
        places = drawn[decoder] if decoder in drawn else self._points(first, second, decoder)[0]
        if self.raw_orthogonality:
            pair = [self._gather(tap, features[tap], first, second, places) for tap in (skip, decoder)]
        else:
            pair = [self._project(skip, features[skip], first, second, places)]
            pair.append(projected.get(decoder) or self._project(decoder, features[decoder], first, second, places))
        return self.orthogonality(*(torch.cat(both) for both in pair))

    def _points(self, first: View, second: View, tap: str) -> tuple[Tensor, Tensor]:
        return corresponding_points(
            first, second, self.backbone.taps[tap], self.samples, self.generator, self.foreground
        )

    def _gather(self, tap: str, features: Tensor, first: View, second: View, places: Tensor) -> tuple[Tensor, Tensor]:
        one, two = features.chunk(2)
        where = self.backbone.taps[tap]
        return at_points(one, first, where, places), at_points(two, second, where, places)

    def _project(self, tap: str, features: Tensor, first: View, second: View, places: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` of both views ``(B, K, D)``; the heads' statistics pool over both, as published."""
        rows = torch.cat(self._gather(tap, features, first, second, places))
        z1, z2 = _rows(self.projectors[_key(tap)], rows).chunk(2)
        return z1, z2

    # --- what is needed, and checks -----------------------------------------------------------------------------------

    def _compared_taps(self) -> list[str]:
        """Taps with a similarity, variance or covariance term."""
        regularised = self.uses("variance") or self.uses("covariance")
        return [
            tap for tap in self.tap_weights if self.uses("similarity") or (regularised and tap in self.decoder_taps)
        ]

    def _projected_taps(self) -> list[str]:
        projected = self.uses("orthogonality") and not self.raw_orthogonality
        return list(dict.fromkeys([*self._compared_taps(), *(self.orthogonal_taps if projected else ())]))

    def _all_taps(self) -> list[str]:
        return list(
            dict.fromkeys([*self._compared_taps(), *(self.orthogonal_taps if self.uses("orthogonality") else ())])
        )

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


def _key(tap: str) -> str:
    """Names of submodules hold no dots."""
    return tap.replace(".", "_")


def _rows(head: nn.Module, vectors: Tensor) -> Tensor:
    """Applies a head on rows to ``(B, K, C)``."""
    return head(vectors.flatten(0, 1)).unflatten(0, vectors.shape[:2])
