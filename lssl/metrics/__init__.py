"""Metrics, one idea per file, as torchmetrics."""

from lssl.metrics.age import AgeR2
from lssl.metrics.alignment import Alignment, Uniformity
from lssl.metrics.correlation import ChannelCorrelation
from lssl.metrics.effective_rank import EffectiveRank
from lssl.metrics.feature_std import FeatureStd
from lssl.metrics.interval import IntervalCorrelation
from lssl.metrics.label_probe import LabelProbe
from lssl.metrics.landmark_error import LandmarkError
from lssl.metrics.matching_accuracy import MatchingAccuracy
from lssl.metrics.order import OrderAUC
from lssl.metrics.position import PositionR2
from lssl.metrics.retrieval import CrossVisitRetrieval, IdentityAUC
from lssl.metrics.temporal_consistency import TemporalConsistency

__all__ = [
    "AgeR2",
    "Alignment",
    "ChannelCorrelation",
    "CrossVisitRetrieval",
    "EffectiveRank",
    "FeatureStd",
    "IdentityAUC",
    "IntervalCorrelation",
    "LabelProbe",
    "LandmarkError",
    "MatchingAccuracy",
    "OrderAUC",
    "PositionR2",
    "TemporalConsistency",
    "Uniformity",
]
