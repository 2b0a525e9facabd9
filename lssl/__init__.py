"""lssl: self-supervised pretraining on longitudinal 3D neuroimages, with interchangeable strategies.

Names are imported on first use, so that ``import lssl`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "Backbone",
    "InputError",
    "PairBatch",
    "Projector",
    "Segmenter",
    "Strategy",
    "View",
    "ViewSampler",
    "Visit",
    "__version__",
]

__version__ = "0.1.0"

_HOMES = {
    "Backbone": "lssl.networks.backbone",
    "InputError": "lssl.utils.errors",
    "PairBatch": "lssl.data.batch",
    "Projector": "lssl.networks.heads",
    "Segmenter": "lssl.segmentation.segmenter",
    "Strategy": "lssl.strategy",
    "View": "lssl.views.sampler",
    "ViewSampler": "lssl.views.sampler",
    "Visit": "lssl.data.batch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lssl' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
