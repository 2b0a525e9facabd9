"""Latent direction: an autoencoder in whose latent space every brain ages in one direction (LSSL).

Zhao, Liu, Adeli, Pohl: "Longitudinal self-supervised learning", Medical Image Analysis 2021 (arXiv 2006.06930). The
text was not available; the abstract says that a cosine loss on a standard autoencoder makes ageing change the
representation along one direction. The terms follow the implementation in the code that accompanies LNE (Ouyang et
al., MICCAI 2021; https://github.com/ouyangjiahong/longitudinal-neighbourhood-embedding), by authors of both papers.

An encoder makes a latent map of a view; z is its mean, and the decoder rebuilds the view from the map. τ is one trained
direction for all subjects. For views 1 and 2 and their signed interval Δt:

============== =============================================================================== ======
term           formula                                                                         weight
============== =============================================================================== ======
reconstruction mean over both views and all voxels of (c - x)²; c is the decoded view, x the   10
               view before intensities were changed
direction      1 - cos(sign(Δt) (z₂ - z₁), τ)                                                  1
============== =============================================================================== ======

z τ / |τ| says how old a brain looks, without unit.

Differences from that code:

* z is the mean of a latent map of 128 channels. There it is the whole map (16 × 4 × 4 × 4), flattened: that presumes
  whole brains in one place, and views here are crops from anywhere.
* The decoder is ours (:class:`lssl.networks.latent.LatentAutoencoder`). A U-Net's own decoder would copy the image
  from its skip connections, past the latent map.
* The weights there are 2 and 1; whether its images have the scale of ours is not known.
* Visits are presented in random order (:func:`lssl.data.pair_order.in_random_order`), so that the direction cannot
  encode how first and second views are cut. A pair without known, different times is left out of *direction*, and the
  log gives the share of such pairs (``skipped``).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.data.pair_order import in_random_order
from lssl.networks.backbone import Backbone
from lssl.networks.heads import feature_std
from lssl.networks.latent import LatentAutoencoder
from lssl.strategy import Strategy
from lssl.utils.distributed import weighted_mean
from lssl.utils.errors import positive
from lssl.utils.intervals import require_order, signed_interval
from lssl.views.sampler import View

__all__ = ["LatentDirection"]


class LatentDirection(Strategy):
    """An autoencoder in whose latent space every brain ages in one direction (LSSL, Zhao et al., 2021).

    Args:
        backbone: network and taps.
        tap: feature map that the latent map is made of; one of the encoder, so that the network's decoder does not run.
        latent: channels of the latent map, the length of z and τ.
        hidden: width of the layers around the latent map.
        **common: see :class:`lssl.task.Task`.
    """

    LOSS_WEIGHTS: ClassVar = {"reconstruction": 10.0, "direction": 1.0}

    def __init__(
        self, backbone: Backbone, tap: str = "bottleneck", latent: int = 128, hidden: int = 128, **common: Any
    ) -> None:
        super().__init__(backbone, **common)
        positive(latent=latent, hidden=hidden)
        backbone.freeze_unused([tap])
        self.tap = tap
        self.autoencoder = LatentAutoencoder(backbone.taps[tap], backbone.in_channels, latent, hidden)
        self.autoencoder.decoder.requires_grad_(self.uses("reconstruction"))
        self.direction = nn.Parameter(F.normalize(torch.randn(latent), dim=0), requires_grad=self.uses("direction"))

    def setup(self, stage: str) -> None:
        """Refuses data without known intervals."""
        super().setup(stage)
        if stage == "fit" and self.uses("direction"):
            require_order(self.data_source.table, type(self).__name__)

    def draw_views(self, batch: PairBatch) -> tuple[View, View]:
        """Views of both visits, in random order."""
        return self.views(in_random_order(batch, self.generator), self.generator)

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """See the module's table."""
        maps = self._latent(torch.cat([first.image, second.image]))
        z = self.autoencoder.vectors(maps)
        self.log_metric("feature_std", feature_std(z))
        terms = {}
        if self.uses("reconstruction"):
            terms["reconstruction"] = F.mse_loss(self.autoencoder.decode(maps), torch.cat([first.clean, second.clean]))
        if self.uses("direction"):
            years, ordered = signed_interval(first.time, second.time)
            one, two = z.chunk(2)
            cosine = F.cosine_similarity(two - one, self.direction[None])
            terms["direction"] = weighted_mean(1 - years.sign() * cosine, ordered)
            self.log_metric("skipped", 1 - ordered.mean())
        return terms

    def position(self, image: Tensor) -> Tensor:
        """``(B,)`` how far along the direction images ``(B, C, D, H, W)`` lie: how old they look, without unit."""
        return self.autoencoder.vectors(self._latent(image)) @ F.normalize(self.direction, dim=0)

    def show_reconstruction(self, view: View) -> tuple[Tensor, Tensor] | None:
        """The view, and what the decoder makes of its latent map."""
        return (view.image, self.autoencoder.decode(self._latent(view.image))) if self.uses("reconstruction") else None

    def _latent(self, image: Tensor) -> Tensor:
        return self.autoencoder(self.backbone(image, [self.tap])[self.tap])
