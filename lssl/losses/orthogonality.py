"""Orthogonality of decoder features and the skip connection's encoder features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lssl.losses.cosine import cosine
from lssl.utils.distributed import weighted_mean

__all__ = ["Orthogonality"]


class Orthogonality(nn.Module):
    """``mean cos(e, d)²``: 0 if the decoder's features are new, 1 if they repeat the skip connection's.

    Ren et al. (NeurIPS 2022) compare encoder and decoder at the first concatenation after the bottleneck. Gradients
    flow to both sides. The mean runs over the samples of all ranks.

    Paper: https://arxiv.org/abs/2206.04281. Reference code:
    https://github.com/mengweiren/longitudinal-representation-learning.

    Example:
        >>> import torch
        >>> Orthogonality()(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item()
        0.0
    """

    def forward(self, encoder: Tensor, decoder: Tensor, weight: Tensor | None = None) -> Tensor:
        """Loss of vectors ``(B, ..., D)`` at the same voxels.

        Args:
            encoder: encoder features in the skip connection.
            decoder: decoder features after the concatenation.
            weight: ``(B,)`` weight of each sample in the mean; ``None`` weighs all alike.
        """
        with torch.autocast(encoder.device.type, enabled=False):
            squared = cosine(encoder.float(), decoder.float()).square()
            return weighted_mean(squared.flatten(1).mean(1) if squared.ndim > 1 else squared, weight)
