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
from lssl.networks.backbone import Backbone
from lssl.timed_strategy import LatentStrategy
from lssl.utils.distributed import weighted_mean
from lssl.utils.intervals import signed_interval
from lssl.views.sampler import View

__all__ = ["LatentDirection"]


class LatentDirection(LatentStrategy):
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
        super().__init__(backbone, tap, latent, hidden, **common)
        self.direction = nn.Parameter(F.normalize(torch.randn(latent), dim=0), requires_grad=self.uses("direction"))

    def direction_term(self, z: tuple[Tensor, Tensor], first: View, second: View, batch: PairBatch) -> Tensor:
        """See the module's table."""
        years, ordered = signed_interval(first.time, second.time)
        cosine = F.cosine_similarity(z[1] - z[0], self.direction[None])
        self.log_metric("skipped", 1 - ordered.mean())
        return weighted_mean(1 - years.sign() * cosine, ordered)

    def position(self, image: Tensor) -> Tensor:
        """``(B,)`` how far along the direction images ``(B, C, D, H, W)`` lie: how old they look, without unit."""
        return self.autoencoder.vectors(self.latent_map(image)) @ F.normalize(self.direction, dim=0)
