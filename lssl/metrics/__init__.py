"""Metrics, one idea per file, as torchmetrics."""

from lssl.metrics.age import AgeR2
from lssl.metrics.alignment import Alignment, Uniformity
from lssl.metrics.correlation import ChannelCorrelation
from lssl.metrics.effective_rank import EffectiveRank
from lssl.metrics.feature_consistency import FeatureConsistency
from lssl.metrics.feature_std import FeatureStd
from lssl.metrics.interval import IntervalCorrelation
from lssl.metrics.label_probe import LabelProbe
from lssl.metrics.landmark_error import LandmarkError
from lssl.metrics.matching_accuracy import MatchingAccuracy
from lssl.metrics.order import OrderAUC
from lssl.metrics.percent_change import PercentChange
from lssl.metrics.position import PositionR2
from lssl.metrics.retrieval import CrossVisitRetrieval, IdentityAUC
from lssl.metrics.reversal_rate import ReversalRate
from lssl.metrics.temporal_consistency import TemporalConsistency
from lssl.metrics.trajectory_error import TrajectoryError

__all__ = [
    "AgeR2",
    "Alignment",
    "ChannelCorrelation",
    "CrossVisitRetrieval",
    "EffectiveRank",
    "FeatureConsistency",
    "FeatureStd",
    "IdentityAUC",
    "IntervalCorrelation",
    "LabelProbe",
    "LandmarkError",
    "MatchingAccuracy",
    "OrderAUC",
    "PercentChange",
    "PositionR2",
    "ReversalRate",
    "TemporalConsistency",
    "TrajectoryError",
    "Uniformity",
]
