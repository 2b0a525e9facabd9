"""Same-subject retrieval across visits."""

from __future__ import annotations

from torch import Tensor

from lssl.metrics.visits import VisitMetric, auc

__all__ = ["CrossVisitRetrieval", "IdentityAUC"]


class CrossVisitRetrieval(VisitMetric):
    """Share of visits whose nearest other visit, by cosine of standardised embeddings, is of the same subject.

    Visits of subjects seen once are candidates but no queries. A visit that is added twice counts once. A constant
    embedding scores as chance: ties go to the first candidate.
    """

    def compute(self) -> Tensor:
        """Retrieval at 1, NaN if no subject has two visits."""
        similarity, same = self.similarities()
        queries = same.any(1)
        hit = same.gather(1, similarity.argmax(1, keepdim=True))[:, 0]
        return hit[queries].float().mean()


class IdentityAUC(VisitMetric):
    """Probability that two visits of one subject are more alike than two visits of different subjects.

    By cosine of standardised embeddings; ½ for embeddings that do not know the subject, or are constant.
    """

    def compute(self) -> Tensor:
        """NaN if no subject has two visits, or there is but one subject."""
        similarity, same = self.similarities()
        upper = similarity.new_ones(similarity.shape).triu(1).bool()
        return auc(similarity[upper & same], similarity[upper & ~same])
