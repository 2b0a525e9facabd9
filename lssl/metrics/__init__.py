"""Metrics, one idea per file, as torchmetrics."""

from lssl.metrics.effective_rank import EffectiveRank
from lssl.metrics.landmark_error import LandmarkError
from lssl.metrics.percent_change import PercentChange
from lssl.metrics.position import PositionR2
from lssl.metrics.retrieval import CrossVisitRetrieval
from lssl.metrics.reversal_rate import ReversalRate
from lssl.metrics.temporal_consistency import TemporalConsistency
from lssl.metrics.trajectory_error import TrajectoryError

__all__ = [
    "CrossVisitRetrieval",
    "EffectiveRank",
    "LandmarkError",
    "PercentChange",
    "PositionR2",
    "ReversalRate",
    "TemporalConsistency",
    "TrajectoryError",
]
