"""Supervised contrast: points of one class attract, all others repel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.utils.distributed import weighted_mean
from lssl.utils.errors import positive

__all__ = ["SupervisedContrast"]


class SupervisedContrast(nn.Module):
    """Contrasts points of a sample by their classes, with every point of the same class a positive.

    ``L_i = -1/|P(i)| Σ_{p ∈ P(i)} log e^{z_i·z_p/τ} / Σ_{a ≠ i} e^{z_i·z_a/τ}`` with z L2-normalised, and P(i) the
    other points of i's class (L_out, equation 2 of Khosla et al., NeurIPS 2020). A sample's loss is the mean over its
    anchors: points of a class above 0 that have a positive. Points of class 0, the background, which looks like many
    things, are negatives alone; those of unknown class, below 0, do not exist.

    Paper: https://arxiv.org/abs/2004.11362. Reference code: https://github.com/HobbitLong/SupContrast.

    Args:
        temperature: τ.

    Example:
        >>> import torch
        >>> z = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1]]])
        >>> same, mixed = torch.tensor([[1, 1, 2, 2]]), torch.tensor([[1, 2, 1, 2]])
        >>> bool(SupervisedContrast()(z, same) < SupervisedContrast()(z, mixed))
        True
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        positive(temperature=temperature)
        self.temperature = temperature

    def forward(self, z: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
        """Loss of projections ``(..., B, N, D)`` of N points each, one for each leading index.

        Args:
            z: projections.
            label: ``(..., B, N)`` classes.
            weight: ``(..., B)`` weight of each sample in the mean; a sample without an anchor has none.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=-1)
            logits = z @ z.mT / self.temperature
            itself = torch.eye(z.shape[-2], dtype=torch.bool, device=z.device)
            known = (label >= 0)[..., None, :] & ~itself
            alike = (label[..., :, None] == label[..., None, :]) & (label > 0)[..., None] & ~itself
            positives = alike.sum(-1)
            total = logits.masked_fill(~known, -1e4).logsumexp(-1)  # finite where nothing is known
            loss = total - (logits * alike).sum(-1) / positives.clamp_min(1)
            anchors = (positives > 0).float()
            mean = (loss * anchors).sum(-1) / anchors.sum(-1).clamp_min(1)
            usable = (anchors.sum(-1) > 0).float()
            return weighted_mean(mean, usable if weight is None else usable * weight)
