"""InfoNCE against a queue of earlier keys, the loss of MoCo."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.utils.distributed import weighted_mean
from lssl.utils.errors import positive

__all__ = ["QueueInfoNCE"]


class QueueInfoNCE(nn.Module):
    """``-log e^{q·k⁺/τ} / (e^{q·k⁺/τ} + Σ_j e^{q·k_j/τ})``, j over the queued keys of *other subjects*.

    MoCo (He et al., CVPR 2020, eq. 1); q and k are L2-normalised, and keys get no gradient. Empty slots of the queue
    and keys of the query's own subject are left out.

    Paper: https://arxiv.org/abs/1911.05722. Reference code: https://github.com/facebookresearch/moco.

    Args:
        temperature: τ.

    Example:
        >>> import torch
        >>> q, queue = torch.eye(3)[:1], torch.eye(3)[1:]
        >>> QueueInfoNCE(temperature=0.05)(q, q, torch.tensor([0]), queue, torch.tensor([1, 2])).item() < 1e-6
        True
    """

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__()
        positive(temperature=temperature)
        self.temperature = temperature

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        subject: Tensor,
        queue: Tensor,
        subject_ids: Tensor,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Loss of one direction.

        Args:
            query: ``(B, D)`` embeddings of one view.
            key: ``(B, D)`` embeddings of the other view.
            subject: ``(B,)`` subject ids.
            queue: ``(K, D)`` earlier keys.
            subject_ids: ``(K,)`` subject ids of the keys, -1 for empty slots.
            weight: ``(B,)`` weight of each pair in the mean; ``None`` weighs all alike.
        """
        with torch.autocast(query.device.type, enabled=False):
            query = F.normalize(query.float(), dim=1)
            key, queue = (F.normalize(keys.detach().float(), dim=1) for keys in (key, queue))
            negatives = (query @ queue.T).masked_fill(
                (subject_ids == subject[:, None]) | (subject_ids < 0), float("-inf")
            )
            logits = torch.cat([(query * key).sum(1, keepdim=True), negatives], 1) / self.temperature
            loss = F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long), reduction="none")
            return weighted_mean(loss, weight)
