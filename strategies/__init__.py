"""One file per method; each reads top to bottom like its paper.

Names are imported on first use: ``from lssl.strategies import LongitudinalLocal``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lssl.utils.lazy import lazy_names

if TYPE_CHECKING:
    from .anatomical_embedding import AnatomicalEmbedding
    from .anatomical_invariance import AnatomicalInvariance
    from .global_contrastive import GlobalContrastive
    from .label_contrast import LabelContrast
    from .latent_direction import LatentDirection
    from .longitudinal_local import LongitudinalLocal
    from .masked_autoencoder import MaskedAutoencoder
    from .neighbourhood_embedding import NeighbourhoodEmbedding
    from .prior_guided_local import PriorGuidedLocal
    from .siamese_masked_autoencoder import SiameseMaskedAutoencoder
    from .temporal_order import TemporalOrder
    from .trajectory_order import TrajectoryOrder
    from .trajectory_prediction import TrajectoryPrediction

__all__ = [
    "AnatomicalEmbedding",
    "AnatomicalInvariance",
    "GlobalContrastive",
    "LabelContrast",
    "LatentDirection",
    "LongitudinalLocal",
    "MaskedAutoencoder",
    "NeighbourhoodEmbedding",
    "PriorGuidedLocal",
    "SiameseMaskedAutoencoder",
    "TemporalOrder",
    "TrajectoryOrder",
    "TrajectoryPrediction",
]

_HOMES = {
    "AnatomicalEmbedding": "lssl.strategies.anatomical_embedding",
    "AnatomicalInvariance": "lssl.strategies.anatomical_invariance",
    "GlobalContrastive": "lssl.strategies.global_contrastive",
    "LabelContrast": "lssl.strategies.label_contrast",
    "LatentDirection": "lssl.strategies.latent_direction",
    "LongitudinalLocal": "lssl.strategies.longitudinal_local",
    "MaskedAutoencoder": "lssl.strategies.masked_autoencoder",
    "NeighbourhoodEmbedding": "lssl.strategies.neighbourhood_embedding",
    "PriorGuidedLocal": "lssl.strategies.prior_guided_local",
    "SiameseMaskedAutoencoder": "lssl.strategies.siamese_masked_autoencoder",
    "TemporalOrder": "lssl.strategies.temporal_order",
    "TrajectoryOrder": "lssl.strategies.trajectory_order",
    "TrajectoryPrediction": "lssl.strategies.trajectory_prediction",
}

if not TYPE_CHECKING:  # for a type checker it would make every unknown name an object
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
