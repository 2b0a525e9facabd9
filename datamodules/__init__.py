"""Sources of pairs: each module makes a visit table of one kind of storage and reads its visits.

Nothing is imported here, so that naming one source does not load the libraries of the others:
``from lssl.datamodules.nifti import NiftiDataModule``.
"""

from __future__ import annotations

__all__: list[str] = []
