"""Siamese masked autoencoder: the later visit, mostly masked, is rebuilt with the earlier one and the years between.

STAMP: Emre et al.: "Stochastic Siamese MAE Pretraining for Longitudinal Medical Images", 2025 (arXiv 2512.23441). Of
the paper, the abstract and summaries could be read, not the formulas; the table is what the authors' public code does.
h₁ and h₂ are features of one tap, of the earlier view 1 and of the masked later view 2, Δt ≥ 0 years apart; v₁ and v₂
are their pools (mean and maximum), normalised, and v₁ is told Δt. z is drawn from the posterior: 32 variables of 32
categories each.

============== ====================================================================================== ======
term           formula                                                                                weight
============== ====================================================================================== ======
reconstruction mean over pairs of the mean of (c - x)² over masked voxels of view 2; c is what the    1
               decoder makes of h₂, which attends to z, to v₁ with Δt and to h₁; x is the view before
               intensities were changed
divergence     max(β KL(q ‖ sg p) + (1 - β) KL(sg q ‖ p), ε) of the posterior q(z | v₁, v₂) and the    0.01
               prior p(z | v₁), summed over variables; β = 0.2, ε = 0.1
============== ====================================================================================== ======

* What neither the earlier visit nor the visible blocks tell of the later one goes through z, which the prior must
  foresee from the earlier visit and Δt: more than one course is possible.
* Which visit is the earlier one is read from the times. Visits are presented in random order, so that the network
  cannot learn how first and second views are cut. A pair of unknown interval is left out, and the log gives the share
  of such pairs (``skipped``).
* Both visits must show one box, as in ``base/over_time.yaml``: the decoder matches features by their place in the view.

Deviations, most of them because any network may stand in place of a ViT:

* Pools of a tap replace the class token, and Δt is added to the pool, not to the token before the encoder.
* Masked voxels are 0. A convolution fills masked cells from what is visible around them, where the paper's decoder has
  a mask token. Blocks of 16 voxels are masked, in the code patches of the ViT.
* The decoder has torch's layers (self-attention before cross-attention, in the code after it), 4 of width 256 (there 8
  of 384).
* ε limits the divergence of a pair, in the code that of a batch, so that several processes see what one of the whole
  batch does. Time is continuous, in months; the code has steps of 30 days.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.metrics.masked import explained_share, masked_mean
from lssl.networks.attention import DecoderLayer
from lssl.networks.backbone import Backbone
from lssl.networks.feature_geometry import Tap
from lssl.networks.heads import feature_std, mean_and_max
from lssl.networks.latent import LatentAutoencoder
from lssl.timed_strategy import TimedStrategy
from lssl.utils.distributed import weighted_mean
from lssl.utils.errors import InputError, positive
from lssl.utils.transfer import send
from lssl.views.masking import BlockMasking
from lssl.views.sampler import View

__all__ = ["FutureDecoder", "SiameseMaskedAutoencoder", "TimeEmbedding"]


class SiameseMaskedAutoencoder(TimedStrategy):
    """A masked later visit is rebuilt with the earlier visit and the years between (STAMP, Emre et al., 2025).

    The log shows ``explained``, the share of the masked voxels' variance that the reconstruction explains.

    Args:
        backbone: network and taps.
        tap: feature map; one of the encoder, so that the network's decoder does not run.
        mask_ratio: share of the later view's blocks that are masked.
        block: side(s) of a block in voxels.
        width: of the decoder; its heads divide it.
        depth: layers of the decoder.
        heads: of its attention.
        variables: of z.
        categories: of each variable.
        balance: β, the share of the divergence that moves the posterior; the rest moves the prior.
        free: ε in nats; below it, a pair's divergence has no gradient.
        **common: see :class:`lssl.task.Task`.
    """

    LOSS_WEIGHTS: ClassVar = {"reconstruction": 1.0, "divergence": 0.01}

    def __init__(
        self,
        backbone: Backbone,
        tap: str = "bottleneck",
        mask_ratio: float = 0.75,
        block: int | tuple[int, int, int] = 16,
        width: int = 256,
        depth: int = 4,
        heads: int = 8,
        variables: int = 32,
        categories: int = 32,
        balance: float = 0.2,
        free: float = 0.1,
        **common: Any,
    ) -> None:
        super().__init__(backbone, **common)
        positive(width=width, depth=depth, heads=heads, variables=variables, categories=categories)
        if width % heads:
            raise InputError(f"width: the {heads} heads of the decoder do not divide {width}.")
        if not 0 <= balance <= 1 or free < 0:
            raise InputError(f"balance is a share and free 0 or more, not {balance:g} and {free:g}.")
        backbone.freeze_unused([tap])
        self.tap, self.balance, self.free, self.shape = tap, balance, free, (variables, categories)
        self.masking = BlockMasking(backbone, self.views.size, block, mask_ratio)
        pooled, latent = 2 * backbone.taps[tap].channels, variables * categories
        self.norm, self.time = nn.LayerNorm(pooled), TimeEmbedding(pooled)
        self.posterior, self.prior = _perceptron(2 * pooled, latent), _perceptron(pooled, latent)
        sizes = backbone.in_channels, pooled, latent, width, depth, heads
        self.decoder = FutureDecoder(backbone.taps[tap], self.views.size, *sizes)
        self.prior.requires_grad_(self.uses("divergence"))
        self.decoder.requires_grad_(self.uses("reconstruction"))

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """See the module's table."""
        elapsed = (second.time - first.time).float()
        known, years = (elapsed == elapsed).float(), elapsed.nan_to_num(0.0).abs()
        swapped = (elapsed < 0).view(-1, 1, 1, 1, 1)
        earlier = torch.where(swapped, second.image, first.image)
        later, clean = (
            torch.where(swapped, a, b) for a, b in ((first.image, second.image), (first.clean, second.clean))
        )
        masked = self.masking.draw(len(later), self.generator, later.device)
        features = self.features(earlier, later, masked)
        pools = mean_and_max(features)
        past, then = self.norm(pools).chunk(2)
        now = past + self.time(years)
        posterior = self.posterior(torch.cat([now, then], 1)).float().unflatten(1, self.shape)
        each = {}
        if self.uses("reconstruction"):
            made = self.decoder(features, now, self.draw(posterior).flatten(1), years)
            each["reconstruction"] = masked_mean(F.mse_loss(made, clean, reduction="none"), masked)
            self.log_metric("explained", explained_share(each["reconstruction"], clean, masked))
        if self.uses("divergence"):
            each["divergence"] = self.divergence(posterior, self.foreseen(now))
        self.log_metric("feature_std", feature_std(pools[: len(known)]))
        self.log_metric("skipped", 1 - known.mean())
        means = weighted_mean(torch.stack(list(each.values())), known) if each else ()
        return dict(zip(each, means, strict=True))

    def features(self, earlier: Tensor, later: Tensor, masked: Tensor) -> Tensor:
        """The tap's features of earlier images, then of later ones without their masked voxels."""
        hidden = F.pad(masked, (0,) * 8 + (len(masked), 0))  # nothing of the earlier ones
        return self.masking(self.backbone, torch.cat([earlier, later]), hidden, [self.tap])[self.tap]

    def foreseen(self, now: Tensor) -> Tensor:
        """The prior's logits ``(B, variables, categories)``."""
        return self.prior(now).float().unflatten(1, self.shape)

    def draw(self, logits: Tensor) -> Tensor:
        """One category of each variable, as ones among zeros; the gradient is that of the probabilities."""
        uniform = torch.rand(*logits.shape, generator=self.generator).numpy()
        (gumbel,) = send([-np.log(-np.log(uniform.clip(1e-20)))], logits.device)
        chosen = torch.zeros_like(logits).scatter_(-1, (logits + gumbel).argmax(-1, keepdim=True), 1.0)
        probability = logits.softmax(-1)
        return chosen + probability - probability.detach()

    def divergence(self, posterior: Tensor, prior: Tensor) -> Tensor:
        """``(B,)`` divergence of each pair, of logits ``(B, variables, categories)``."""
        # Scaled gradients: at every share, the value is that of the logits themselves
        q = torch.lerp(posterior.detach(), posterior, self.balance).log_softmax(-1)
        p = torch.lerp(prior.detach(), prior, 1 - self.balance).log_softmax(-1)
        return (q.exp() * (q - p)).sum((1, 2)).clamp_min(self.free)


class TimeEmbedding(nn.Module):
    """``(B, width)`` vectors of ``(B,)`` years: cosines and sines of the months, and a perceptron.

    Args:
        width: of the vectors.
        frequencies: number of frequencies, from 1 down to almost 1/160 radians a month.
    """

    frequency: Tensor
    phase: Tensor

    def __init__(self, width: int, frequencies: int = 32) -> None:
        super().__init__()
        frequency = 12 * 160.0 ** -(torch.arange(frequencies) / frequencies)
        self.register_buffer("frequency", frequency.repeat(2), persistent=False)
        quarter = torch.full((frequencies,), math.pi / 2)  # the cosine is the sine of a quarter turn more
        self.register_buffer("phase", torch.cat([quarter, torch.zeros(frequencies)]), persistent=False)
        self.layers = _perceptron(2 * frequencies, width, width)

    def forward(self, years: Tensor) -> Tensor:
        """Embeds years."""
        return self.layers(torch.addcmul(self.phase, years[:, None].float(), self.frequency).sin())


class FutureDecoder(nn.Module):
    """Rebuilds a view from its features, which attend to a latent vector, a pooled one with Δt, and an earlier view's.

    Args:
        tap: the feature map.
        size: voxels of a view.
        image_channels: channels of the image.
        pooled: length of the pooled vector.
        latent: length of the latent vector.
        width: of the layers.
        depth: number of layers.
        heads: of their attention.
    """

    places: Tensor

    def __init__(
        self,
        tap: Tap,
        size: Sequence[int],
        image_channels: int,
        pooled: int,
        latent: int,
        width: int,
        depth: int,
        heads: int,
    ) -> None:
        super().__init__()
        cells = [side // step for side, step in zip(size, tap.stride, strict=True)]
        self.register_buffer("places", _places(cells, width), persistent=False)
        self.patches = LatentAutoencoder(tap, image_channels, width, width)
        self.of_latent, self.of_pooled, self.time = (
            nn.Linear(latent, width),
            nn.Linear(pooled, width),
            TimeEmbedding(width),
        )
        self.layers = nn.ModuleList(DecoderLayer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor, now: Tensor, z: Tensor, years: Tensor) -> Tensor:
        """``(B, C, D, H, W)`` float32 of features ``(2 B, C', d, h, w)``, the earlier first, vectors and years."""
        maps = self.patches(features)
        before, rows = (maps.flatten(2).transpose(1, 2) + self.places.to(maps)).chunk(2)
        told = self.of_latent(z), self.of_pooled(now) + self.time(years)
        memory = torch.cat([*(vector[:, None] for vector in told), before], 1)
        for layer in self.layers:
            rows = layer(rows, memory)
        return self.patches.decode(self.norm(rows).transpose(1, 2).unflatten(2, features.shape[2:]))


def _perceptron(inputs: int, outputs: int, hidden: int | None = None) -> nn.Sequential:
    hidden = hidden or inputs
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


def _places(shape: Sequence[int], width: int) -> Tensor:
    """``(N, width)`` fixed cosines and sines of the cells' indices; zeros fill up what six do not divide."""
    number = max(1, width // 6)
    frequency = 10000.0 ** -(torch.arange(number) / number)
    angles = torch.cartesian_prod(*(torch.arange(side) for side in shape))[..., None] * frequency  # (N, 3, number)
    waves = torch.cat([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]
    return F.pad(waves, (0, width - waves.shape[1]))
