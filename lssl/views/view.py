"""View: augmented crops and their exact position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import EllipsisType

import numpy as np
import torch
from torch import Tensor

from lssl.data.batch import HostPairs, PairBatch
from lssl.views import affines as algebra
from lssl.views import geometry as geo
from lssl.views.intensity import Changes

__all__ = ["Placement", "Plan", "View", "nearest", "split_views"]


@dataclass
class Placement:
    """Where B views of one size lie, on the host: what plans a step.

    Attributes:
        affine: ``(B, 4, 4)`` float64, index → frame in mm.
        source_affine: ``(B, 4, 4)``, index → frame of the source of the crop.
        source_extent: ``(B, 3)``, voxels of the source that are data.
        source_foreground: ``(B, …)`` bool, on the source's own grid.
        size: voxels of a view.
        motion: ``(B, 3, d, h, w)`` mm, how far the tissue moves until the other view's visit; ``None``: the frame tells
            where it is.
        motion_affine: ``(B, 4, 4)``, index of ``motion`` → frame.
    """

    affine: np.ndarray
    source_affine: np.ndarray
    source_extent: np.ndarray
    source_foreground: np.ndarray
    size: tuple[int, int, int]
    motion: np.ndarray | None = None
    motion_affine: np.ndarray | None = None

    @classmethod
    def of(cls, affine: np.ndarray, pairs: HostPairs, visit: int, size: Sequence[int], field: bool = True) -> Placement:
        """Views of one visit of each pair; with ``field``, their motion is that of the pairs, if it is known."""
        d, h, w = size
        place = cls(affine, pairs.affines[:, visit], pairs.extent[:, visit], pairs.foreground[:, visit], (d, h, w))
        if field and pairs.motion is not None and pairs.motion_affine is not None:
            place.motion, place.motion_affine = pairs.motion[:, visit], pairs.motion_affine[:, visit]
        return place

    def follow(self, points: np.ndarray, rows: np.ndarray | EllipsisType = ...) -> np.ndarray:
        """Where the tissue at points ``(B, N, 3)`` lies at the other view's visit, in mm; or at those of some rows."""
        if self.motion is None or self.motion_affine is None:
            return points
        arrays = points, self.motion[rows], self.motion_affine[rows]
        return _follow(*(torch.from_numpy(each) for each in arrays)).numpy()

    def contains(self, points: np.ndarray, foreground: bool = False) -> np.ndarray:
        """See :meth:`View.contains`."""
        seen = algebra.contains(algebra.transform(algebra.inverse(self.affine), points), self.size, -0.5)
        in_source = algebra.transform(algebra.inverse(self.source_affine), points)
        seen &= algebra.contains(in_source, self.source_extent[:, None])
        return seen & nearest(self.source_foreground, in_source) if foreground else seen


@dataclass
class Plan:
    """What the host decided about the views of each pair or series.

    Attributes:
        affines: ``(B, K, 4, 4)``, index → frame.
        times: ``(B, K)`` years.
        grid: parts of the sampling grid.
        one_map: whether all visits are sampled at one grid.
        changes: of the intensities.
        shown: ``(B, K, C)`` bool, the channels that the views show; the others are 0. ``None``: all.
    """

    affines: np.ndarray
    times: np.ndarray
    grid: list[np.ndarray]
    one_map: bool
    changes: Changes | None
    shown: np.ndarray | None = None


def nearest(masks: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Values ``(B, N)`` of masks ``(B, D, H, W)`` at the voxels nearest to indices ``(B, N, 3)``; false outside."""
    voxel = np.rint(index).astype(np.int64)
    last = np.asarray(masks.shape[1:]) - 1
    inside = ((voxel >= 0) & (voxel <= last)).all(-1)
    i, j, k = np.moveaxis(voxel.clip(0, last), -1, 0)
    return masks[np.arange(len(masks))[:, None], i, j, k] & inside


def _follow(points: Tensor, motion: Tensor, affine: Tensor) -> Tensor:
    return points + geo.sample(motion, affine, points).to(points.dtype)


@dataclass
class View:
    """B augmented crops.

    Attributes:
        image: ``(B, C, D, H, W)`` float32, what the network sees.
        clean: the same crop before intensity augmentation (the target of denoising).
        affine: ``(B, 4, 4)`` float64, index → frame in mm.
        source_affine: ``(B, 4, 4)``, index → frame of the source of the crop.
        source_extent: ``(B, 3)``, voxels of the source that are data.
        source_foreground: ``(B, …)`` bool, on the source's own grid.
        age: ``(B,)`` years at the visit, NaN where unknown.
        time: ``(B,)`` years since the subject's first visit, NaN where unknown (0 if both views show one visit).
        source_label: ``(B, …)`` int16, on the source's own grid; ``None`` if no visit has any.
        motion: ``(B, 3, d, h, w)`` float32 mm, how far the tissue moves until the other view's visit; ``None``: the
            frame tells where it is.
        motion_affine: ``(B, 4, 4)``, index of ``motion`` → frame.
        shown: ``(B, C)`` bool, the channels that ``image`` and ``clean`` show; the others are 0. ``None``: all.
    """

    image: Tensor
    clean: Tensor
    affine: Tensor
    source_affine: Tensor
    source_extent: Tensor
    source_foreground: Tensor
    age: Tensor
    time: Tensor
    source_label: Tensor | None = None
    motion: Tensor | None = None
    motion_affine: Tensor | None = None
    shown: Tensor | None = None

    @classmethod
    def of(
        cls, batch: PairBatch, visit: int, image: Tensor, clean: Tensor, affine: Tensor, time: Tensor, field: bool
    ) -> View:
        """A view of one visit of each pair; with ``field``, its motion is that of the batch, if it is known."""
        field = field and batch.motion is not None
        return cls(
            image=image,
            clean=clean,
            affine=affine,
            source_affine=batch.affines[:, visit],
            source_extent=batch.extent[:, visit],
            source_foreground=batch.foreground[:, visit],
            age=batch.ages[:, visit],
            time=time,
            source_label=None if batch.labels is None else batch.labels[:, visit],
            motion=batch.motion[:, visit] if field else None,  # type: ignore[index]
            motion_affine=batch.motion_affine[:, visit] if field else None,  # type: ignore[index]
        )

    def __post_init__(self) -> None:
        self._host: Placement | None = None

    @property
    def host(self) -> Placement:
        """The view's place on the host; a view that no sampler has drawn is read back from its device."""
        if self._host is not None and self.affine.device.type != "cpu":
            return self._host
        tensors = self.affine, self.source_affine, self.source_extent, self.source_foreground
        affine, source, extent, foreground = (tensor.cpu().numpy() for tensor in tensors)
        moving = (None if each is None else each.cpu().numpy() for each in (self.motion, self.motion_affine))
        return Placement(affine, source, extent, foreground, self.size, *moving)

    def place(self, placement: Placement) -> None:
        """Sets :attr:`host`, for a view whose place was planned there."""
        self._host = placement

    @cached_property
    def foreground(self) -> Tensor:
        """``(B, 1, D, H, W)`` float32, 1 where the nearest voxel of the source is foreground."""
        return self._nearest(self.source_foreground, 0).float()

    @cached_property
    def label(self) -> Tensor | None:
        """``(B, 1, D, H, W)`` int16 of the nearest voxel, -1 outside the source or where a visit has none."""
        return None if self.source_label is None else self._nearest(self.source_label, -1)

    def _nearest(self, volume: Tensor, outside: float) -> Tensor:
        points = geo.transform(self.affine, geo.lattice(self.size, self.affine.device))
        return geo.sample_nearest(volume, self.source_affine, points, outside).unflatten(1, (1, *self.size))

    @property
    def size(self) -> tuple[int, int, int]:
        """Voxels along ``(D, H, W)``."""
        d, h, w = self.image.shape[-3:]
        return d, h, w

    def picture(self) -> np.ndarray:
        """``(D, H, W)`` float32: the first channel that the first view shows."""
        channel = 0 if self.shown is None else int(self.shown[0].int().argmax())
        return self.image[0, channel].float().cpu().numpy()

    def follow(self, points: Tensor) -> Tensor:
        """Where the tissue at points ``(B, N, 3)`` of the frame lies at the other view's visit, in mm."""
        known = self.motion is not None and self.motion_affine is not None
        return _follow(points, self.motion, self.motion_affine) if known else points  # type: ignore[arg-type]

    def contains(self, points: Tensor, foreground: bool = False) -> Tensor:
        """Which points ``(B, N, 3)`` of the frame the view shows from real data (if asked, from the foreground)."""
        seen = geo.contains(geo.transform(geo.inverse(self.affine), points), self.size, -0.5)
        in_source = geo.transform(geo.inverse(self.source_affine), points)
        seen &= geo.contains(in_source, self.source_extent[:, None])  # the source fades to 0 beyond its last voxels
        if foreground:
            seen &= geo.sample_nearest(self.source_foreground, self.source_affine, points, 0)
        return seen


def split_views(
    batch: PairBatch,
    pairs: HostPairs,
    plan: Plan,
    made: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    moving: bool,
) -> tuple[View, ...]:
    """One view of each visit.

    Args:
        batch: sources.
        pairs: the same on the host.
        plan: of the views.
        made: images ``(B, K, C, ...)``, the same before intensities were changed, affines, times, and the channels
            shown.
        moving: whether views know how tissue moves until the other one's visit.
    """
    image, clean, affines, time, shown = made
    views = []
    for visit in range(image.shape[1]):
        view = View.of(batch, visit, image[:, visit], clean[:, visit], affines[:, visit], time[:, visit], moving)
        view.shown = None if shown is None else shown[:, visit]
        view.place(Placement.of(plan.affines[:, visit], pairs, visit, view.size, moving))
        views.append(view)
    return tuple(views)
