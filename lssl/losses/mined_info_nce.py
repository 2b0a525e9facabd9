"""InfoNCE of points against hard and diverse negatives (Yan et al., TMI 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lssl.utils.distributed import weighted_mean
from lssl.utils.errors import positive

__all__ = ["MinedInfoNCE"]


class MinedInfoNCE(nn.Module):
    """Discriminates each anchor's positive from the candidates that are most similar to the anchor.

    ``L = -log e^{a·p/τ} / (e^{a·p/τ} + Σ_{n∈N(a)} e^{a·n/τ} + Σ_o e^{a·o/τ})`` of vectors of unit length.

    * ``N(a)`` are ``diverse`` candidates, drawn at random from the ``hard`` allowed candidates that rank highest for
      ``a``. The highest alone would come from a few neighbourhoods.
    * ``o`` are further negatives common to all anchors, such as points of other subjects.
    * Candidates that are not allowed have the logit -∞. A similarity of 0 would outrank true negatives, whose
      similarity is often below 0.

    (SAM: Yan et al., IEEE TMI 2022.)

    Paper: https://arxiv.org/abs/2012.02383. Reference code:
    https://github.com/alibaba-damo-academy/self-supervised-anatomical-embedding-v2.

    Args:
        temperature: τ (SAM: 0.5).
        hard: hardest candidates kept per anchor (SAM: 2000, and 250 in its coarse map).
        diverse: negatives drawn from them (SAM: 500, and 200 in its coarse map).

    Example:
        >>> import torch
        >>> loss = MinedInfoNCE(temperature=0.05, hard=2, diverse=2)
        >>> a, rows = torch.eye(3)[None, :1], torch.eye(3)[None]
        >>> allowed = torch.tensor([[[False, True, True]]])  # the first row is the anchor itself
        >>> loss(a, a, rows, allowed, generator=torch.Generator()).item() < 1e-4
        True
    """

    def __init__(self, temperature: float = 0.5, hard: int = 2000, diverse: int = 500) -> None:
        super().__init__()
        positive(temperature=temperature, hard=hard, diverse=diverse)
        self.temperature, self.hard, self.diverse = temperature, hard, diverse

    def forward(
        self,
        anchor: Tensor,
        own: Tensor,
        candidates: Tensor,
        allowed: Tensor,
        generator: torch.Generator,
        ranking: Tensor | None = None,
        cross_subject_negatives: tuple[Tensor, Tensor] | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Mean loss of ``(B, K)`` anchors; they, their positives and all candidates have unit length.

        Args:
            anchor: ``(B, K, D)`` anchors.
            own: ``(B, K, D)`` positive of each anchor.
            candidates: ``(B, M, D)`` possible negatives.
            allowed: ``(B, K, M)`` bool, true for candidates that may be negatives of an anchor.
            generator: draws the diverse candidates, on the device of the anchors.
            ranking: ``(B, K, M)`` scores that select the hard candidates; ``None`` takes the similarity itself.
            cross_subject_negatives: rows ``(L, D)``, and bool ``(B, L)``, true for the samples that may use a row. With
                rows ``(G, L, D)``, each of G equal parts of the samples has rows of its own.
            weight: ``(B,)`` weight of each sample in the mean; 0 for a sample without corresponding points. With
                ``(G, B / G)`` there is one mean for each of G equal parts of the samples.
        """
        with torch.autocast(anchor.device.type, enabled=False):
            anchor, own, candidates = anchor.float(), own.float(), candidates.float()
            if ranking is None:
                ranking = anchor @ candidates.mT
            index, used = self.mine(ranking, allowed, generator)
            rows = candidates.gather(1, index.flatten(1)[..., None].expand(-1, -1, candidates.shape[2]))
            negative = (rows.unflatten(1, index.shape[1:]) @ anchor[..., None])[..., 0]
            logits = [(anchor * own).sum(-1, keepdim=True), negative.masked_fill(~used, float("-inf"))]
            if cross_subject_negatives is not None:
                extra = cross_subject_negatives[0].float()
                extra = anchor.reshape(extra.shape[0] if extra.ndim == 3 else 1, -1, anchor.shape[2]) @ extra.mT
                logits.append(
                    extra.view(*anchor.shape[:2], -1).masked_fill(~cross_subject_negatives[1][:, None], float("-inf"))
                )
            both = torch.cat(logits, 2) / self.temperature
            losses = (both.logsumexp(2) - both[..., 0]).mean(1)
            return weighted_mean(losses if weight is None else losses.view_as(weight), weight)

    @torch.no_grad()
    def mine(self, ranking: Tensor, allowed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Indices ``(B, K, diverse)`` of drawn candidates (or of all, if fewer), and a mask of the allowed ones.

        Samples draw alike: the same places in their own lists.
        """
        ranking = ranking.masked_fill(~allowed, float("-inf"))
        hard = ranking.topk(min(self.hard, ranking.shape[2]), dim=2, sorted=False).indices
        scores = torch.rand(hard.shape[1:], generator=generator, device=hard.device)
        scores = scores + allowed.gather(2, hard)  # candidates that are not allowed come last
        index = hard.gather(2, scores.topk(min(self.diverse, hard.shape[2]), dim=2, sorted=False).indices)
        return index, allowed.gather(2, index)
