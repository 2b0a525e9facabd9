"""Metrics, one idea per file, as torchmetrics."""

from lssl.metrics.effective_rank import EffectiveRank
from lssl.metrics.landmark_error import LandmarkError
from lssl.metrics.position import PositionR2
from lssl.metrics.retrieval import CrossVisitRetrieval

__all__ = ["CrossVisitRetrieval", "EffectiveRank", "LandmarkError", "PositionR2"]
