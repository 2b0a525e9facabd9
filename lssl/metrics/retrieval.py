"""Same-subject retrieval across visits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

__all__ = ["CrossVisitRetrieval"]


class CrossVisitRetrieval(Metric):
    """Share of visits whose nearest other visit, by cosine of standardised embeddings, is of the same subject.

    Visits of subjects seen once are candidates but no queries. A visit that is added twice counts once. A constant
    embedding scores as chance: ties go to the first candidate.
    """

    full_state_update = False
    higher_is_better = True
    embeddings: list[Tensor]
    subjects: list[Tensor]
    sessions: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("embeddings", "subjects", "sessions"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, embedding: Tensor, subject: Tensor, session: Tensor) -> None:
        """Adds visits.

        Args:
            embedding: ``(B, C)``.
            subject: ``(B,)`` subject ids.
            session: ``(B,)`` visit ids.
        """
        self.embeddings.append(embedding.float())
        self.subjects.append(subject)
        self.sessions.append(session)

    def compute(self) -> Tensor:
        """Retrieval at 1, NaN if no subject has two visits."""
        sessions = dim_zero_cat(self.sessions)
        order = sessions.argsort(stable=True)
        first = torch.ones_like(order, dtype=torch.bool)
        first[1:] = sessions[order][1:] != sessions[order][:-1]
        keep = order[first]
        embedding, subject = dim_zero_cat(self.embeddings)[keep], dim_zero_cat(self.subjects)[keep]
        standard = (embedding - embedding.mean(0)) / embedding.std(0).clamp_min(1e-8)
        similarity = F.normalize(standard, dim=1) @ F.normalize(standard, dim=1).T
        similarity.fill_diagonal_(float("-inf"))
        same = (subject[:, None] == subject).fill_diagonal_(False)
        queries = same.any(1)
        hit = same.gather(1, similarity.argmax(1, keepdim=True))[:, 0]
        return hit[queries].float().mean()
