"""lssl: self-supervised pretraining on longitudinal 3D neuroimages, with interchangeable strategies.

Names are imported on first use, so that ``import lssl`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lssl.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lssl.checkpoint import load
    from lssl.data.batch import PairBatch, Visit
    from lssl.data.datamodule import PairDataModule
    from lssl.features import load_backbone
    from lssl.lesions.change_segmenter import ChangeSegmenter
    from lssl.networks.backbone import Backbone
    from lssl.networks.heads import Projector
    from lssl.prediction.classifier import Classifier
    from lssl.prediction.regressor import Regressor
    from lssl.segmentation.segmenter import Segmenter
    from lssl.strategy import Strategy
    from lssl.task import Task
    from lssl.utils.errors import InputError
    from lssl.views.intensity import IntensityTransform
    from lssl.views.sampler import View, ViewSampler

__all__ = [
    "Backbone",
    "ChangeSegmenter",
    "Classifier",
    "InputError",
    "IntensityTransform",
    "PairBatch",
    "PairDataModule",
    "Projector",
    "Regressor",
    "Segmenter",
    "Strategy",
    "Task",
    "View",
    "ViewSampler",
    "Visit",
    "__version__",
    "load",
    "load_backbone",
]

__version__ = "0.1.0"

_HOMES = {
    "Backbone": "lssl.networks.backbone",
    "ChangeSegmenter": "lssl.lesions.change_segmenter",
    "Classifier": "lssl.prediction.classifier",
    "InputError": "lssl.utils.errors",
    "IntensityTransform": "lssl.views.intensity",
    "PairBatch": "lssl.data.batch",
    "PairDataModule": "lssl.data.datamodule",
    "Projector": "lssl.networks.heads",
    "Regressor": "lssl.prediction.regressor",
    "Segmenter": "lssl.segmentation.segmenter",
    "Strategy": "lssl.strategy",
    "Task": "lssl.task",
    "View": "lssl.views.sampler",
    "ViewSampler": "lssl.views.sampler",
    "Visit": "lssl.data.batch",
    "load": "lssl.checkpoint",
    "load_backbone": "lssl.features",
}

if not TYPE_CHECKING:  # for a type checker it would make every unknown name an object
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
