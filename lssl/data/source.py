"""DataSource: what tasks and callbacks may ask of a datamodule, beside its loaders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
from torch import Tensor

__all__ = ["DataSource"]


@runtime_checkable
class DataSource(Protocol):
    """The contract between data and tasks; :class:`lssl.data.datamodule.PairDataModule` fulfils it.

    Attributes:
        table: after ``setup``: one row per visit with ``subject``, ``session``, ``age`` and ``split``; ids in a batch
            count its rows.
        summary: after ``setup``: what was found, used and excluded, in words.
        label_names: what label values are called, where that is known.
        common_frame: all subjects lie in one template's frame, so that a place of one can be looked up in another.
        knows_correspondence: :meth:`correspond` tells the truth about any two visits.
    """

    table: pd.DataFrame
    summary: str
    label_names: dict[int, str]
    common_frame: bool
    knows_correspondence: bool

    def check_crop(self, size: Sequence[int]) -> None:
        """Raises InputError if a view of ``size`` voxels does not fit into the source of every visit."""

    def correspond(self, points: Tensor, first: int, second: int) -> Tensor:
        """True places in one visit of points of another.

        Args:
            points: ``(N, 3)`` mm in the recorded frame of the first visit.
            first: row of its visit in the table.
            second: row of the other visit.

        Returns:
            ``(N, 3)`` mm in the recorded frame of the second visit; NaN where nothing is known.
        """

    def use_labels(self, unlabelled_pairs: bool) -> None:
        """Asks for loaders of labelled visits, and of unlabelled pairs beside them."""

    def labelled_rows(self, split: str) -> np.ndarray:
        """Rows of the table whose labels may be seen; in ``train``, those that few-shot training chooses."""

    def read_label(self, row: int) -> np.ndarray | None:
        """``(D, H, W)`` int16 label map of the visit in a row; ``None`` if it has none."""

    def channels(self) -> list[str]:
        """Names of the images' channels, in their order."""

    def voxel_size(self) -> np.ndarray:
        """``(3,)`` mm between voxels."""
