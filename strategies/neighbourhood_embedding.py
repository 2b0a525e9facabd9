"""Neighbourhood embedding: brains that look alike change alike (LNE).

Ouyang, Zhao, Adeli, Sullivan, Pfefferbaum, Zaharchuk, Pohl: "Self-supervised Longitudinal Neighbourhood Embedding",
MICCAI 2021 (arXiv 2103.03840). Of the text only the abstract and the introduction were available. Terms and defaults
follow the authors' code (https://github.com/ouyangjiahong/longitudinal-neighbourhood-embedding).

An encoder makes a latent map of a view; z is its mean, and the decoder rebuilds the view from the map. The trajectory
of a pair is its change a year, v = (z₂ - z₁) / Δt. The neighbours of pair i are the K pairs of other subjects whose
earlier visits lie closest to its own earlier visit, over the batches of all devices, at distances d:

============== =============================================================================== ======
term           formula                                                                         weight
============== =============================================================================== ======
reconstruction mean over both views and all voxels of (c - x)²; c is the decoded view, x the   20
               view before intensities were changed
direction      1 - cos(vᵢ, hᵢ), hᵢ = Σⱼ wᵢⱼ vⱼ over the neighbours j, Σⱼ wᵢⱼ = 1,              1
               wᵢⱼ ~ exp(-dᵢⱼ² / 2σᵢ²), σᵢ the largest less the smallest d of i
============== =============================================================================== ======

Trajectories need not agree everywhere, as in :mod:`lssl.strategies.latent_direction`, but only where brains look alike.
Gradients flow through trajectories, neighbours and weights, as in the authors' code.

Differences from that code:

* z is the mean of a latent map of 128 channels. There it is the whole map (16 × 4 × 4 × 4), flattened: that presumes
  whole brains in one place, and views here are crops from anywhere.
* The decoder is ours (:class:`lssl.networks.latent.LatentAutoencoder`). A U-Net's own decoder would copy the image from
  its skip connections, past the latent map.
* The reconstruction's weight there is 2; whether its images have the scale of ours is not known.
* Other pairs of a subject are not its neighbours: they change alike by themselves.
* A pair without known, different times has no trajectory. It is no neighbour and is left out of *direction*, as is a
  pair without neighbours; the log gives their share (``skipped``).
* Visits are presented in random order (:func:`lssl.data.pair_order.in_random_order`), so that trajectories cannot
  encode how first and second views are cut.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lssl.data.batch import PairBatch
from lssl.networks.backbone import Backbone
from lssl.timed_strategy import LatentStrategy
from lssl.utils.distributed import gather, weighted_mean, world_size
from lssl.utils.errors import InputError, positive
from lssl.utils.intervals import signed_interval
from lssl.views.sampler import View

__all__ = ["NeighbourhoodEmbedding"]


class NeighbourhoodEmbedding(LatentStrategy):
    """Brains that look alike change alike, in an autoencoder's latent space (LNE, Ouyang et al., 2021).

    Args:
        backbone: network and taps.
        tap: feature map that the latent map is made of; one of the encoder, so that the network's decoder does not run.
        latent: channels of the latent map, the length of z.
        hidden: width of the layers around the latent map.
        neighbours: K (LNE: 5, of batches of 64); all pairs of other subjects if there are fewer.
        **common: see :class:`lssl.task.Task`.
    """

    LOSS_WEIGHTS: ClassVar = {"reconstruction": 20.0, "direction": 1.0}

    def __init__(
        self,
        backbone: Backbone,
        tap: str = "bottleneck",
        latent: int = 128,
        hidden: int = 128,
        neighbours: int = 5,
        **common: Any,
    ) -> None:
        super().__init__(backbone, tap, latent, hidden, **common)
        positive(neighbours=neighbours)
        self.neighbours = neighbours

    def direction_term(self, z: tuple[Tensor, Tensor], first: View, second: View, batch: PairBatch) -> Tensor:
        """See the module's table."""
        self._check_batch(len(z[0]))
        years, ordered = signed_interval(first.time, second.time)
        return self._direction(*z, years, batch.subject.masked_fill(ordered == 0, -1))

    def _direction(self, one: Tensor, two: Tensor, years: Tensor, subject: Tensor) -> Tensor:
        """The term of latent vectors ``(B, D)``; a subject of -1 marks a pair without a trajectory."""
        earlier = torch.where((years < 0)[:, None], two, one)
        change = (two - one) / torch.where(years == 0, 1, years)[:, None]
        everyone, changes = gather(torch.stack([earlier, change], 1)).unbind(1)
        subjects = gather(subject)
        candidate = (subjects >= 0) & (subjects != subject[:, None])
        weights = self._weights(earlier, everyone, candidate)
        used = candidate.any(1) & (subject >= 0)
        self.log_metric("skipped", 1 - used.float().mean())
        return weighted_mean(1 - F.cosine_similarity(change, weights @ changes), used.float())

    def _weights(self, own: Tensor, everyone: Tensor, candidate: Tensor) -> Tensor:
        """``(B, N)`` weights of the nearest candidates, which sum to 1; of no use in a row without candidates."""
        square = (own[:, None] - everyone).square().sum(2)
        far = square.masked_fill(~candidate, torch.inf)
        nearest = far.topk(min(self.neighbours, far.shape[1]), largest=False).indices
        chosen = torch.zeros_like(candidate).scatter_(1, nearest, True) & candidate
        largest = square.masked_fill(~candidate, 0).amax(1)
        smallest = torch.where(candidate.any(1), far.amin(1), 0)
        tiny = torch.finfo(square.dtype).tiny
        sigma = largest.clamp_min(tiny).sqrt() - smallest.clamp_min(tiny).sqrt()
        logits = -square / (2 * sigma.square().clamp_min(1e-12))[:, None]
        return logits.masked_fill(~chosen, torch.finfo(logits.dtype).min).softmax(1)

    def _check_batch(self, pairs: int) -> None:
        everywhere = pairs * world_size()
        if self.training and everywhere < 2:
            raise InputError(
                f"NeighbourhoodEmbedding compares pairs of different subjects, but a batch holds {everywhere}: raise "
                "data.init_args.batch_size."
            )
