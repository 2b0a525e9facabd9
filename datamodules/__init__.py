"""Sources of pairs: each module makes a visit table of one kind of storage and reads its visits.

Names are imported on first use, so that one source does not load the libraries of the others:
``from lssl.datamodules import NiftiDataModule``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lssl.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lssl.data.datamodule import PairDataModule

    from .label_maps import LabelMapDataModule
    from .nifti import NiftiDataModule
    from .phantom import PhantomDataModule
    from .prepared import PreparedDataModule
    from .subjects import SubjectsDataModule
    from .synthetic_brains import SyntheticBrainsDataModule

__all__ = [
    "LabelMapDataModule",
    "NiftiDataModule",
    "PairDataModule",
    "PhantomDataModule",
    "PreparedDataModule",
    "SubjectsDataModule",
    "SyntheticBrainsDataModule",
]

_HOMES = {
    "LabelMapDataModule": "lssl.datamodules.label_maps",
    "NiftiDataModule": "lssl.datamodules.nifti",
    "PairDataModule": "lssl.data.datamodule",
    "PhantomDataModule": "lssl.datamodules.phantom",
    "PreparedDataModule": "lssl.datamodules.prepared",
    "SyntheticBrainsDataModule": "lssl.datamodules.synthetic_brains",
    "SubjectsDataModule": "lssl.datamodules.subjects",
}

if not TYPE_CHECKING:  # for a type checker it would make every unknown name an object
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
