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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lssl.data import STEP
from lssl.utils.transfer import send

__all__ = ["HostPairs", "PairBatch", "Visit", "collate"]


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
        targets: ``(T,)`` float32, the datamodule's targets in their order; NaN where unknown.
        motion: ``(3, d, h, w)`` float32 mm, how far the tissue moves until the other visit of the pair, at knots over
            the source box; see :mod:`lssl.data.motion`. ``None`` unless a task asks for it.
        motion_affine: ``(4, 4)`` float64, index of ``motion`` → frame.
        present: ``(C,)`` bool, which channels the visit has; the others are 0. ``None``: all.
    """

    image: Tensor
    affine: Tensor
    foreground: Tensor
    age: float = float("nan")
    time: float = float("nan")
    label: Tensor | None = None
    subject: int = 0
    session: int = 0
    targets: Tensor | None = None
    motion: Tensor | None = None
    motion_affine: Tensor | None = None
    present: Tensor | None = None


@dataclass
class HostPairs:
    """What plans a step, on the host: fields of :class:`PairBatch` as arrays, which are only read."""

    affines: np.ndarray
    extent: np.ndarray
    foreground: np.ndarray
    times: np.ndarray
    subject: np.ndarray
    session: np.ndarray
    motion: np.ndarray | None = None
    motion_affine: np.ndarray | None = None
    present: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.affines)

    def visits(self, index: np.ndarray, rows: np.ndarray | None = None) -> HostPairs:
        """See :meth:`PairBatch.visits`."""
        rows = np.arange(len(self))[:, None] if rows is None else rows
        known = {name: value for name, value in vars(self).items() if value is not None}
        fields = {name: value if value.ndim == 1 else value[rows, index] for name, value in known.items()}
        if self.motion is not None:
            fields["motion"] = fields["motion"] * _still(rows, index)
        return HostPairs(**fields)

    def times_within_pair(self) -> np.ndarray:
        """``(B, K)`` times, but 0 where a visit of unknown time is paired with itself: that interval is 0."""
        same = (self.session[:, :1] == self.session).all(1, keepdims=True) & np.isnan(self.times)
        return np.where(same, np.float32(0), self.times)


@dataclass
class PairBatch:
    """B pairs of visits as tensors, or series of K visits, in time order where their times are known.

    Of pairs, K is 2. The option ``visits_per_item`` of a datamodule makes it larger.

    Attributes:
        images: ``(B, K, C, D, H, W)`` float32 sources; voxels beyond ``extent`` are padding. A loader may give int16
            steps; :meth:`to` converts them to float32.
        affines: ``(B, K, 4, 4)`` float64, index → frame in mm.
        extent: ``(B, K, 3)`` int64, how many voxels of each axis are data; padding follows them.
        foreground: ``(B, K, D, H, W)`` bool.
        ages: ``(B, K)`` float32 years, NaN where unknown.
        times: ``(B, K)`` float32 years since the subject's first visit, NaN where unknown. Intervals come from these:
            a time may be known without an age.
        labels: ``(B, K, D, H, W)`` int16, -1 where a visit has none; ``None`` if no visit of the batch has any.
        subject: ``(B,)`` int64 subject ids, equal for pairs of one subject.
        session: ``(B, K)`` int64 visit ids, equal within a same-visit pair.
        targets: ``(B, K, T)`` float32, the datamodule's targets in their order, NaN where unknown; ``None`` without.
        motion: ``(B, 2, 3, d, h, w)`` float32 mm, from each visit of a pair to the other, see :class:`Visit`; ``None``
            without, and for series.
        motion_affine: ``(B, 2, 4, 4)`` float64, index of ``motion`` → frame.
        present: ``(B, K, C)`` bool, which channels each visit has; the others are 0. ``None``: all visits have all.
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
    targets: Tensor | None = None
    motion: Tensor | None = None
    motion_affine: Tensor | None = None
    present: Tensor | None = None

    def __post_init__(self) -> None:
        self._host: HostPairs | None = None

    def __len__(self) -> int:
        """Number of pairs, or of series."""
        return self.images.shape[0]

    @property
    def visits_per_item(self) -> int:
        """K: 2 for pairs."""
        return self.images.shape[1]

    @property
    def size(self) -> tuple[int, int, int]:
        """Voxels of the sources along ``(D, H, W)``."""
        d, h, w = self.images.shape[-3:]
        return d, h, w

    @property
    def host(self) -> HostPairs:
        """What plans a step: kept by :meth:`to` on the CPU, so that nothing is read back from a device."""
        if self._host is not None and self.affines.device.type != "cpu":
            return self._host
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(HostPairs)}
        return HostPairs(**{name: value.cpu().numpy() for name, value in values.items() if value is not None})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        """The same batch on another device, with float32 images: int16 steps are scaled after the transfer."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        if moved.images.dtype == torch.int16:
            moved.images = moved.images.float() * STEP
        moved._host = self.host
        return moved

    def pin_memory(self) -> PairBatch:
        """The same batch in page-locked memory, for asynchronous copies to the device."""
        return self._map(Tensor.pin_memory)

    def rows(self, index: slice | Tensor) -> PairBatch:
        """Some of the pairs, in the order of ``index``."""
        return self._map(lambda tensor: tensor[index])

    def visits(self, index: Tensor, rows: Tensor | None = None) -> PairBatch:
        """The same subjects, with visits ``index (B, N)`` in this order: of pairs, each is 0 or 1, and N is 2.

        Args:
            index: which visits of a pair or series; on the CPU.
            rows: ``(B, N)`` pairs that the visits are taken from; by default each pair's own. Subject ids stay.

        Between a visit and itself, or another subject's, nothing is known to move.
        """
        rows = torch.arange(len(self))[:, None] if rows is None else rows
        place = send([(self.visits_per_item * rows + index).flatten().numpy()], self.images.device)[0]

        def chosen(tensor: Tensor) -> Tensor:
            return tensor if tensor.ndim == 1 else tensor.flatten(0, 1)[place].unflatten(0, index.shape)

        moved = self._map(chosen)
        if moved.motion is not None:
            (still,) = send([_still(rows.numpy(), index.numpy())], moved.motion.device)
            moved.motion = moved.motion * still
        moved._host = self.host.visits(index.numpy(), rows.numpy())
        return moved

    def ends(self) -> PairBatch:
        """Pairs of the first and the last visit of each series; pairs stay as they are."""
        last = self.visits_per_item - 1
        return self if last == 1 else self.visits(torch.tensor([[0, last]]).expand(len(self), 2))

    def neighbours(self) -> list[PairBatch]:
        """Pairs of each two visits that follow one another, from the first two on; of pairs, these alone."""
        later = range(1, self.visits_per_item)
        if len(later) == 1:
            return [self]
        return [self.visits(torch.tensor([[visit - 1, visit]]).expand(len(self), 2)) for visit in later]

    def picture(self, pair: int, visit: int) -> Tensor:
        """``(D, H, W)`` float32: the first channel that a visit has."""
        channel = 0 if self.present is None else int(self.present[pair, visit].int().argmax())
        return self.images[pair, visit, channel].float()

    def _map(self, function: Callable[[Tensor], Tensor]) -> PairBatch:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved: dict[str, Any] = {name: None if value is None else function(value) for name, value in values.items()}
        return PairBatch(**moved)


def _still(rows: np.ndarray, index: np.ndarray) -> np.ndarray:
    """``(B, 2, 1, 1, 1, 1)`` float32: 1 for the two visits of a pair, 0 for any other two."""
    pair = (rows[:, 0] == rows[:, -1]) & (index[:, 0] != index[:, 1])  # rows may be one column
    return np.repeat(pair.astype(np.float32), 2).reshape(-1, 2, 1, 1, 1, 1)


def _stack_motion(visits: Sequence[Visit]) -> dict[str, Tensor]:
    """The motion of B pairs and its affines, or nothing; that of smaller boxes is continued beyond them."""
    fields = [visit.motion for visit in visits if visit.motion is not None]
    affines = [visit.motion_affine for visit in visits if visit.motion_affine is not None]
    if not fields:
        return {}
    size = [max(field.shape[axis] for field in fields) for axis in (1, 2, 3)]
    padded = []
    for field in fields:
        d, h, w = (wanted - have for wanted, have in zip(size, field.shape[1:], strict=True))
        padded.append(F.pad(field[None], [0, w, 0, h, 0, d], mode="replicate")[0] if d or h or w else field)
    stacked = {"motion": torch.stack(padded), "motion_affine": torch.stack(affines)}
    return {name: values.unflatten(0, (-1, 2)) for name, values in stacked.items()}


def _stack_present(visits: Sequence[Visit], shape: tuple[int, int]) -> Tensor | None:
    """``(B, K, C)`` bool; ``None`` if all visits have all channels."""
    if all(visit.present is None for visit in visits):
        return None
    every = torch.ones(len(visits[0].image), dtype=torch.bool)
    return torch.stack([every if visit.present is None else visit.present for visit in visits]).unflatten(0, shape)


def collate(pairs: Sequence[Sequence[Visit]]) -> PairBatch:
    """Stacks pairs, or series of equally many visits.

    Smaller sources are padded with zeros after their last voxel, and ``extent`` records their size.
    """
    visits, shape = [visit for pair in pairs for visit in pair], (len(pairs), len(pairs[0]))
    size = [max(visit.image.shape[axis] for visit in visits) for axis in (1, 2, 3)]

    def stack(volumes: Sequence[Tensor], value: float = 0) -> Tensor:
        padded = []
        for volume in volumes:
            missing = [wanted - have for wanted, have in zip(size, volume.shape[-3:], strict=True)]
            padding = [0, missing[2], 0, missing[1], 0, missing[0]]
            padded.append(F.pad(volume, padding, value=value) if any(missing) else volume)
        return torch.stack(padded).unflatten(0, shape)

    labelled = any(visit.label is not None for visit in visits)
    labels = [
        torch.full(visit.image.shape[1:], -1, dtype=torch.int16) if visit.label is None else visit.label
        for visit in visits
    ]
    targets = [visit.targets for visit in visits if visit.targets is not None]
    return PairBatch(
        images=stack([visit.image for visit in visits]),
        affines=torch.stack([visit.affine for visit in visits]).unflatten(0, shape),
        extent=torch.tensor([visit.image.shape[1:] for visit in visits]).unflatten(0, shape),
        foreground=stack([visit.foreground for visit in visits]),
        ages=torch.tensor([[visit.age for visit in pair] for pair in pairs], dtype=torch.float32),
        times=torch.tensor([[visit.time for visit in pair] for pair in pairs], dtype=torch.float32),
        labels=stack(labels, -1) if labelled else None,
        subject=torch.tensor([pair[0].subject for pair in pairs]),
        session=torch.tensor([[visit.session for visit in pair] for pair in pairs]),
        targets=torch.stack(targets).unflatten(0, shape) if targets else None,
        present=_stack_present(visits, shape),
        **_stack_motion(visits),
    )
