"""DataSource: the attributes and methods of a datamodule that tasks and callbacks use, besides its loaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from torch import Tensor
from torch.utils.data import DataLoader

from lssl.data.pairs import count
from lssl.data.previous import Previous
from lssl.data.samples import SampleKind, Samples
from lssl.data.targets import Target
from lssl.utils.errors import InputError

__all__ = ["DataSource", "learns_partial", "refuse_other_channels", "refuse_partial", "refuse_series"]


@runtime_checkable
class DataSource(Protocol):
    """The contract between data and tasks; :class:`lssl.data.datamodule.PairDataModule` fulfils it.

    Attributes:
        table: after ``setup``: one row per visit with ``subject``, ``session``, ``age`` and ``split``; visit ids in a
            batch are its row numbers.
        location: file or folder of the visits, or a name of the data.
        summary: after ``setup``: what was found, used and excluded, in words.
        label_names: label value → its name, if known.
        common_frame: whether all subjects are aligned to one template, so that positions can be compared across
            subjects.
        knows_correspondence: whether :meth:`correspond` is exact for any two visits.
        targets: after ``setup``: name → column to predict; a batch's ``targets`` are in their order.
        visits_per_item: visits of a subject that a batch of pairs holds together: 2, or more in series.
    """

    table: pd.DataFrame
    location: str
    summary: str
    label_names: dict[int, str]
    common_frame: bool
    knows_correspondence: bool
    targets: dict[str, Target]
    visits_per_item: int

    def check_crop(self, size: Sequence[int]) -> None:
        """Raises InputError if a view of ``size`` voxels does not fit into the source of every visit."""

    def correspond(self, points: Tensor, first: int, second: int) -> Tensor:
        """True positions, in a second visit, of points of a first visit.

        Args:
            points: ``(N, 3)`` mm in the recorded frame of the first visit.
            first: row of its visit in the table.
            second: row of the other visit.

        Returns:
            ``(N, 3)`` mm in the recorded frame of the second visit; NaN where nothing is known.
        """

    def use_labels(self, unlabelled_pairs: bool, previous: Previous = "no") -> None:
        """Switches the loaders to labelled visits, each with its previous one if asked, and to unlabelled pairs."""

    def use_targets(self, name: str, kind: SampleKind) -> Samples:
        """Switches the loaders to samples whose target is known; prediction takes all."""

    def use_motion(self) -> None:
        """Also reads how tissue moves between the visits of a pair; InputError if these data do not know."""

    def fixed_pairs(self, most: int) -> DataLoader:
        """At most so many training pairs with their centred boxes, in fixed order."""

    def labelled_rows(self, split: str) -> np.ndarray:
        """Rows of the table whose labels may be seen; in ``train``, the few-shot choice."""

    def read_label(self, row: int) -> np.ndarray | None:
        """``(D, H, W)`` int16 label map of the visit in a row; ``None`` if it has none."""

    def channels(self) -> list[str]:
        """Names of the images' channels, in their order."""

    def present(self) -> np.ndarray | None:
        """``(visits, C)`` bool, which channels each visit has; ``None``: all visits have all."""

    def shapes(self) -> np.ndarray:
        """``(visits, 3)`` voxels per axis."""

    def voxel_sizes(self) -> np.ndarray:
        """``(visits, 3)`` mm between voxels."""

    def working_spacing(self) -> np.ndarray:
        """``(3,)`` mm, the median voxel size of the training visits."""

    def resample_to(self, spacing: np.ndarray) -> np.ndarray:
        """Loads boxes for views of this spacing; ``(visits, 3)`` voxels of each visit in a step of it."""


def refuse_series(data: DataSource, method: str) -> None:
    """Refuses data in series, for a method that compares two visits."""
    if data.visits_per_item > 2:
        raise InputError(
            f"data.init_args.visits_per_item is {data.visits_per_item}, and {method} takes pairs of visits; set it to "
            f"2, or choose a method that takes series."
        )


def refuse_other_channels(data: DataSource, taken: int) -> None:
    """Refuses images whose channels are not as many as a network takes."""
    names = data.channels()
    if len(names) != taken:
        many = f"{len(names)} channels" if len(names) > 1 else "1 channel"
        raise InputError(
            f"The data have {many} ({', '.join(names)}) and the network takes {taken}: set backbone.in_channels "
            f"(and the network's own option, if it is given by class_path) to {len(names)}, or give data with "
            f"{taken}."
        )


def learns_partial(data: DataSource | None, contrasts: str) -> bool:
    """Whether a network learns from images that lack some channels: of visits, or hidden by its views.

    Args:
        data: of the training.
        contrasts: ``views.contrasts`` of the training.
    """
    return contrasts != "same" or (data is not None and data.present() is not None)


def refuse_partial(data: DataSource, checkpoint: Mapping[str, Any]) -> None:
    """Refuses visits that lack channels, for a network that has always seen all: zeros would be taken for tissue.

    Args:
        data: to be evaluated.
        checkpoint: of the network, with the answer of :func:`learns_partial`.
    """
    if (present := data.present()) is not None and not checkpoint.get("partial_channels", False):
        raise InputError(
            f"{count(int((~present.all(1)).sum()), 'visit')} of {data.location} lack some of the channels "
            f"{', '.join(data.channels())}, and the network was trained with all of them; train it with "
            f"views.contrasts mix, or set data.init_args.missing_channels to drop."
        )
