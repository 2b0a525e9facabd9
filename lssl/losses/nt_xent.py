"""NT-Xent, the loss of SimCLR."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.utils.distributed import gather, rank, weighted_mean
from lssl.utils.errors import positive

__all__ = ["NTXent"]


class NTXent(nn.Module):
    """Discriminates each embedding's partner from the embeddings of other subjects.

    ``l_i = -log e^{z_i·z_p(i)/τ} / (e^{z_i·z_p(i)/τ} + Σ_j e^{z_i·z_j/τ})`` with z L2-normalised and p(i) the other
    view of the pair. j runs over both views of all pairs of *other subjects*, on all ranks; the mean runs over the 2B
    queries (SimCLR, Chen et al., ICML 2020, eq. 1). Other views of the same subject are neither positive nor negative.
    Logits are float32, and the soft-max is a log-sum-exp. Gradients flow to queries and keys, also across ranks.

    Paper: https://arxiv.org/abs/2002.05709. Reference code: https://github.com/google-research/simclr.

    Args:
        temperature: τ.

    Example:
        >>> import torch
        >>> z = torch.eye(4)
        >>> NTXent(temperature=0.05)(z, z, torch.arange(4)).item() < 1e-6
        True
    """

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__()
        positive(temperature=temperature)
        self.temperature = temperature

    def forward(self, z1: Tensor, z2: Tensor, subject: Tensor, weight: Tensor | None = None) -> Tensor:
        """Loss of embeddings ``(B, D)`` of both views.

        Args:
            z1: embeddings of the first views.
            z2: embeddings of the second views.
            subject: ``(B,)`` subject ids.
            weight: ``(B,)`` weight of each pair in the mean; ``None`` weighs all alike.
        """
        with torch.autocast(z1.device.type, enabled=False):
            queries = F.normalize(torch.cat([z1, z2]).float(), dim=1)
            keys = gather(queries.unflatten(0, (2, -1)).transpose(0, 1))  # (W B, 2, D): both views of each pair
            logits = queries @ keys.transpose(0, 1).flatten(0, 1).T / self.temperature
            everyone = gather(subject)
            own = rank() * len(z1) + torch.arange(len(z1), device=z1.device)
            partner = torch.cat([own + len(everyone), own])
            excluded = subject.repeat(2)[:, None] == everyone.repeat(2)[None]  # itself and its subject's other views
            excluded = excluded.scatter(1, partner[:, None], False)
            loss = F.cross_entropy(logits.masked_fill(excluded, float("-inf")), partner, reduction="none")
            return weighted_mean(loss, None if weight is None else weight.repeat(2))
