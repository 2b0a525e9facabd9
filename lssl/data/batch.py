"""PairBatch: the contract between data and strategies.

Axes are array axes ``(D, H, W)`` = ``(i, j, k)`` of the NIfTI array in its closest canonical orientation, so that ``D``
runs from left to right. An affine maps an index ``(i, j, k)``, 0 = centre of the first voxel, into the subject's frame
in mm (RAS+). Visits of one subject share that frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lssl.data import STEP

__all__ = ["PairBatch", "Visit", "collate"]


@dataclass
class Visit:
    """One scan session of one subject, or the source box of it that was read.

    Attributes:
        image: ``(C, D, H, W)`` float32, robustly scaled so that the background is 0 and the brightest tissue about 1;
            or the same as int16 in steps of :data:`lssl.data.STEP`, which halves the transfer to the device.
        affine: ``(4, 4)`` float64, index → frame in mm.
        foreground: ``(D, H, W)`` bool, the head (or brain, where a mask says so).
        age: years, NaN where unknown.
        time: years since the subject's first visit, NaN where unknown.
        label: ``(D, H, W)`` int16, -1 everywhere where the visit has none (``None`` means the same).
        subject: row of the subject in the datamodule's list of subjects.
        session: row of the visit in the datamodule's visit table.
    """

    image: Tensor
    affine: Tensor
    foreground: Tensor
    age: float = float("nan")
    time: float = float("nan")
    label: Tensor | None = None
    subject: int = 0
    session: int = 0


@dataclass
class PairBatch:
    """B pairs of visits as tensors, in time order where their times are known.

    Attributes:
        images: ``(B, 2, C, D, H, W)`` float32 sources; voxels beyond ``extent`` are padding. A loader may give int16
            steps; :meth:`to` converts them to float32.
        affines: ``(B, 2, 4, 4)`` float64, index → frame in mm.
        extent: ``(B, 2, 3)`` int64, how many voxels of each axis are data; padding follows them.
        foreground: ``(B, 2, D, H, W)`` bool.
        ages: ``(B, 2)`` float32 years, NaN where unknown.
        times: ``(B, 2)`` float32 years since the subject's first visit, NaN where unknown. Intervals come from these:
            a time may be known without an age.
        labels: ``(B, 2, D, H, W)`` int16, -1 where a visit has none; ``None`` if no visit of the batch has any.
        subject: ``(B,)`` int64 subject ids, equal for pairs of one subject.
        session: ``(B, 2)`` int64 visit ids, equal within a same-visit pair.
    """

    images: Tensor
    affines: Tensor
    extent: Tensor
    foreground: Tensor
    ages: Tensor
    times: Tensor
    labels: Tensor | None
    subject: Tensor
    session: Tensor

    def __len__(self) -> int:
        """Number of pairs."""
        return self.images.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        """The same batch on another device, with float32 images: int16 steps are scaled after the transfer."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        if moved.images.dtype == torch.int16:
            moved.images = moved.images.float() * STEP
        return moved

    def pin_memory(self) -> PairBatch:
        """The same batch in page-locked memory, for asynchronous copies to the device."""
        return self._map(Tensor.pin_memory)

    def rows(self, index: slice | Tensor) -> PairBatch:
        """Some of the pairs, in the order of ``index``."""
        return self._map(lambda tensor: tensor[index])

    def visits(self, index: Tensor, rows: Tensor | None = None) -> PairBatch:
        """The same subjects, with visits ``index (B, 2)`` (each 0 or 1) as their first and second.

        Args:
            index: which visit of a pair.
            rows: ``(B, 2)`` pairs that the visits are taken from; by default each pair's own. Subject ids stay.
        """
        if rows is None:
            rows = torch.arange(len(self), device=index.device)[:, None]
        return self._map(lambda tensor: tensor if tensor.ndim == 1 else tensor[rows, index])

    def times_within_pair(self) -> Tensor:
        """:attr:`times`, but 0 where a visit of unknown time is paired with itself: that interval is 0."""
        same = (self.session[:, :1] == self.session[:, 1:]) & self.times.isnan()
        return self.times.masked_fill(same, 0.0)

    def _map(self, function: Callable[[Tensor], Tensor]) -> PairBatch:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved: dict[str, Any] = {name: None if value is None else function(value) for name, value in values.items()}
        return PairBatch(**moved)


def collate(pairs: Sequence[tuple[Visit, Visit]]) -> PairBatch:
    """Stacks pairs; smaller sources are padded with zeros after their last voxel, and ``extent`` records their size."""
    visits = [visit for pair in pairs for visit in pair]
    size = [max(visit.image.shape[axis] for visit in visits) for axis in (1, 2, 3)]

    def stack(volumes: Sequence[Tensor], value: float = 0) -> Tensor:
        padded = []
        for volume in volumes:
            missing = [wanted - have for wanted, have in zip(size, volume.shape[-3:], strict=True)]
            padding = [0, missing[2], 0, missing[1], 0, missing[0]]
            padded.append(F.pad(volume, padding, value=value) if any(missing) else volume)
        return torch.stack(padded).unflatten(0, (len(pairs), 2))

    labelled = any(visit.label is not None for visit in visits)
    labels = [
        torch.full(visit.image.shape[1:], -1, dtype=torch.int16) if visit.label is None else visit.label
        for visit in visits
    ]
    return PairBatch(
        images=stack([visit.image for visit in visits]),
        affines=torch.stack([visit.affine for visit in visits]).unflatten(0, (len(pairs), 2)),
        extent=torch.tensor([visit.image.shape[1:] for visit in visits]).unflatten(0, (len(pairs), 2)),
        foreground=stack([visit.foreground for visit in visits]),
        ages=torch.tensor([[visit.age for visit in pair] for pair in pairs], dtype=torch.float32),
        times=torch.tensor([[visit.time for visit in pair] for pair in pairs], dtype=torch.float32),
        labels=stack(labels, -1) if labelled else None,
        subject=torch.tensor([first.subject for first, _ in pairs]),
        session=torch.tensor([[visit.session for visit in pair] for pair in pairs]),
    )
