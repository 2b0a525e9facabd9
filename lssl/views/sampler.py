"""Views: augmented crops of visits, each made by ONE resampling, with a matrix of its exact position.

Published code crops, flips and rotates one after another and replays the steps. Here all parameters are drawn first and
composed into one 4×4 matrix per view; the source is interpolated once. Image and matrix agree by construction, so the
correspondence between two views is exact to rounding error.

The host plans: draws and matrices are float64 arrays of numpy. The device gets grids and parameters in one copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lssl.data.batch import HostPairs, PairBatch
from lssl.data.spacing import TOLERANCE
from lssl.utils.errors import InputError, positive
from lssl.utils.random import host_generator
from lssl.utils.transfer import send
from lssl.views import affines as algebra
from lssl.views import geometry as geo
from lssl.views.contrasts import Contrasts, check_contrasts, draw_shown
from lssl.views.intensity import Changes, IntensityTransform, default_transforms
from lssl.views.overlap import shared_volume
from lssl.views.view import Plan, View, nearest, split_views

__all__ = ["View", "ViewSampler"]


class ViewSampler:
    """Draws the two views of each pair, or the K of each series, batched, on the batch's device.

    Geometry of one view, from its own index ``v`` to the source's index: ``c + L (v - (n - 1)/2)`` with
    ``L = diag(1/s) R diag(w z) F``: mirror F, zoom z and rotation R act in mm about a centre ``c`` that keeps the box
    inside the source where it fits. ``s`` is the source's voxel size and ``w`` the working spacing, which is the same
    for all visits; within 1 % of it, and without one, ``w = s``.

    ``geometry = "shared"`` uses one index map for both visits, as published; if their voxel sizes differ, one box in
    mm. ``"aligned"`` shows the same place of the frame at every voxel of both views, whatever grids the visits have.
    ``"independent"`` draws a second one whose centre is shifted, so that a voxel's place in the crop says nothing
    about its match: networks otherwise read their position off the padding and learn nothing.

    Args:
        size: side(s) of the views in voxels of the working spacing.
        spacing: working spacing of all visits in mm, along one axis each or the same along all. ``None``: the median
            voxel size of the training visits, which the task sets; a checkpoint keeps it.
        same_visit: probability that both views of a pair show one visit, either of the two, instead of one each.
        geometry: ``independent`` (recommended), ``shared`` (as in Ren et al., 2022) or ``aligned``.
        intensity: ``independent`` (recommended) or ``shared`` (as in Ren et al., 2022), down to the noise.
        overlap: smallest shared volume, as a part of the smaller view's. If a few tries find no such pair, the second
            view takes the first one's box.
        zoom: each axis' voxel size is multiplied by a draw from this range (above 1 shows more at less detail).
        rotation: largest rotation in degrees about each axis.
        affine_probability: probability of zoom and rotation.
        flip: probability of a mirror along ``(D, H, W)``; D is left–right.
        flip_together: mirror both views or none, so left and right stay distinct; false draws each mirror alone.
        foreground: centre views on the foreground.
        transforms: intensity transforms in order; ``None`` takes :func:`lssl.views.intensity.default_transforms`.
        correspondence: what shows the same anatomy at two visits: the same place of the frame (``rigid``), or where the
            ``field`` of the data says that the tissue has moved to. Views are placed and made alike.
        contrasts: which channels a view shows, of those that its visit has: all (``same``), others than the other view
            (``cross``), or a random choice (``mix``); the rest is 0. See :func:`.contrasts.draw_shown`.
    """

    CENTRE_TRIES = 32
    OVERLAP_TRIES = (4, 12)  # at once; the second only if the first give none for some pair

    def __init__(
        self,
        size: int | tuple[int, int, int] = 96,
        spacing: float | tuple[float, float, float] | None = None,
        same_visit: float = 0.0,
        geometry: Literal["independent", "shared", "aligned"] = "independent",
        intensity: Literal["independent", "shared"] = "independent",
        overlap: float = 0.5,
        zoom: tuple[float, float] = (0.8, 1.2),
        rotation: float = 10.0,
        affine_probability: float = 0.5,
        flip: tuple[float, float, float] = (0.5, 0.0, 0.0),
        flip_together: bool = True,
        foreground: bool = True,
        transforms: list[IntensityTransform] | None = None,
        correspondence: Literal["rigid", "field"] = "rigid",
        contrasts: Contrasts = "same",
    ) -> None:
        check_contrasts(contrasts)
        if not 0 < overlap <= 1:
            raise InputError(f"views: overlap is a share of the smaller view in (0, 1], not {overlap}.")
        if not 0 < zoom[0] <= zoom[1]:
            raise InputError(f"views: zoom is a range of positive factors, not {zoom}.")
        if not 0 <= same_visit <= 1:
            raise InputError(f"views: same_visit is a probability, not {same_visit}.")
        self.size = (size, size, size) if isinstance(size, int) else size
        self.spacing = (spacing,) * 3 if isinstance(spacing, (int, float)) else spacing
        if self.spacing is not None:
            positive(**{f"views.spacing, axis {axis}": side for axis, side in enumerate(self.spacing)})
        self.samples: tuple[int, int, int] = (1, 1, 1)  # of the source, averaged in a voxel of the view
        self.same_visit, self.geometry, self.intensity = same_visit, geometry, intensity
        self.overlap, self.zoom, self.rotation = overlap, zoom, math.radians(rotation)
        self.affine_probability, self.foreground = affine_probability, foreground
        self.flip, self.flip_together = flip, flip_together
        self.transforms = default_transforms() if transforms is None else transforms
        self.moving, self.contrasts = correspondence == "field", contrasts

    def __call__(self, batch: PairBatch, generator: torch.Generator) -> tuple[View, View]:
        """Two views per pair, or of the first and last visit of a series; see :meth:`series`."""
        first, second = self.series(batch.ends(), generator)
        return first, second

    def series(self, batch: PairBatch, generator: torch.Generator) -> tuple[View, ...]:
        """A view of each of the K visits: each other one is placed relative to the first as the second of a pair is.

        So each overlaps the first view as ``overlap`` says, and two others may share less. Any two of them correspond
        through the frame. All randomness comes from ``generator``, which lives on the CPU.
        """
        self.check(batch)
        draws = host_generator(generator)
        batch = self._choose_visits(batch, generator)
        pairs, others = batch.host, batch.visits_per_item - 1
        same = {"shared": self._same_map, "aligned": self._same_box}.get(self.geometry)
        turns = self.draw_linear((len(pairs), 1 + (others * self.OVERLAP_TRIES[0] if same is None else 0)), draws)
        first = self._anywhere(pairs, 0, self.in_voxels(turns[:, 0], pairs.affines[:, 0]), draws)
        rest = self._place_others(pairs, first, turns[:, 1:], draws) if same is None else same(pairs, first)
        return self.resample_views(batch, np.concatenate([first[:, None], rest], 1), draws)

    def _choose_visits(self, batch: PairBatch, generator: torch.Generator) -> PairBatch:
        if not self.same_visit:
            return batch
        every, one = torch.arange(batch.visits_per_item), torch.rand(len(batch), 1, generator=generator)
        either = torch.randint(len(every), (len(batch), 1), generator=generator)
        return batch.visits(torch.where(one < self.same_visit, either, every))

    def centred(self, batch: PairBatch) -> tuple[View, View]:
        """Unaugmented views of one box, at the centre of the first visit's foreground; of a series, of its two ends."""
        self.check(batch)
        batch = batch.ends()
        pairs = batch.host
        plain = self.steps(pairs.affines[:, 0])[:, None] * np.eye(3)
        low, high = self.centre_bounds(plain, pairs.extent[:, 0])
        mass = geo.centre_of_mass(torch.from_numpy(pairs.foreground[:, 0])).numpy()
        centre = np.round(mass - self._middle) + self._middle
        maps = self.view_to_source(plain, np.clip(centre, low, high))
        maps = np.concatenate([maps[:, None], self._same_box(pairs, maps)], 1)
        first, second = self.resample_views(batch, maps, None)
        return first, second

    def check(self, batch: PairBatch) -> None:
        """Refuses sources that are smaller than the views; with a working spacing, the data's own check does."""
        if self.spacing is not None:
            return
        have = tuple(batch.images.shape[-3:])
        if any(want > got for want, got in zip(self.size, have, strict=True)):
            raise InputError(
                f"views: a crop of {self.size} voxels does not fit into sources of {have}; use a smaller crop."
            )

    def check_channels(self, names: Sequence[str]) -> None:
        """Refuses images whose channels leave no choice of contrasts."""
        check_contrasts(self.contrasts, names)

    def draw_linear(self, shape: tuple[int, ...], draws: np.random.Generator) -> np.ndarray:
        """``R diag(z) F`` in mm as ``(*shape, 3, 3)`` linear maps."""
        drawn, (low, high) = draws.random((*shape, 10)), self.zoom
        moved = drawn[..., :1] < self.affine_probability
        zoom = np.where(moved, low + (high - low) * drawn[..., 1:4], 1.0)
        angles = np.where(moved, self.rotation * (2 * drawn[..., 4:7] - 1), 0.0)
        return algebra.turn(angles) * np.where(drawn[..., 7:] < self.flip, -zoom, zoom)[..., None, :]

    def resample_to(self, spacing: Sequence[float], steps: np.ndarray) -> None:
        """Sets the working spacing.

        A view voxel of 1.5 source voxels or more is the mean of several samples, as in whole visits.

        Args:
            spacing: ``(3,)`` mm.
            steps: ``(visits, 3)`` voxels of each visit in a step of it. If all are 1, nothing is resampled.
        """
        self.spacing, self.samples = None, (1, 1, 1)
        if (steps != 1).any():
            d, h, w = (float(side) for side in spacing)
            self.spacing = d, h, w
            i, j, k = np.maximum(np.floor(steps.max(0) + 0.5), 1).astype(int).tolist()
            self.samples = i, j, k

    def steps(self, affine: np.ndarray) -> np.ndarray:
        """Voxels of the source in a view voxel, ``(..., 3)``; exactly 1 within 1 % of the working spacing."""
        return self._steps(algebra.spacing(affine))

    def _steps(self, own: np.ndarray) -> np.ndarray:
        """:meth:`steps` of voxel sizes ``(..., 3)`` in mm."""
        if self.spacing is None:
            return np.ones_like(own)
        steps = np.asarray(self.spacing) / own
        return np.where(abs(steps - 1) < TOLERANCE, 1.0, steps)

    def in_voxels(self, linear: np.ndarray, affine: np.ndarray) -> np.ndarray:
        """``L (..., 3, 3)``: a map of view indices from a linear map in mm along the source's axes."""
        own = algebra.spacing(affine)
        return linear * (own * self._steps(own))[..., None, :] / own[..., None]

    def view_to_source(self, linear: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """View index → source index: ``c + L (v - (n - 1)/2)``, ``(..., 4, 4)``."""
        return algebra.homogeneous(linear, centre - linear @ self._middle)

    @property
    def _middle(self) -> np.ndarray:
        return (np.asarray(self.size) - 1) / 2

    @staticmethod
    def _same_box(pairs: HostPairs, first: np.ndarray) -> np.ndarray:
        """``(B, K - 1, 4, 4)``: the maps into the other sources that show the same box of the frame."""
        return algebra.inverse(pairs.affines[:, 1:]) @ pairs.affines[:, :1] @ first[:, None]

    def _same_map(self, pairs: HostPairs, first: np.ndarray) -> np.ndarray:
        """The first map for the other sources; for those whose voxel size differs, the map to the same box."""
        box, own = self._same_box(pairs, first), algebra.spacing(pairs.affines)
        alike = (abs(own[:, :1] / own[:, 1:] - 1).max(-1) < TOLERANCE) | (self.spacing is None)
        return np.where(alike[..., None, None], first[:, None], box)

    def centre_bounds(self, linear: np.ndarray, extent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Centres ``(B, 3)`` that keep the view's box inside the source; the source's middle if it does not fit."""
        half = abs(linear) @ (np.asarray(self.size) / 2)
        low, high = half - 0.5, extent - 0.5 - half
        middle = (extent - 1) / 2.0
        fits = low <= high
        return np.where(fits, low, middle), np.where(fits, high, middle)

    def _anywhere(self, pairs: HostPairs, visit: int, linear: np.ndarray, draws: np.random.Generator) -> np.ndarray:
        """Puts views at random centres of one visit's source, on the foreground if requested."""
        low, high = self.centre_bounds(linear, pairs.extent[:, visit])
        tries = self.CENTRE_TRIES if self.foreground else 1
        centres = low[:, None] + draws.random((len(pairs), tries, 3)) * (high - low)[:, None]
        if self.foreground:
            hit = nearest(pairs.foreground[:, visit], centres)
            centres = centres[np.arange(len(pairs)), hit.argmax(1)]  # the first hit, or the first draw without a hit
        return self.view_to_source(linear, centres.reshape(-1, 3))

    def _place_others(
        self, pairs: HostPairs, first: np.ndarray, turns: np.ndarray, draws: np.random.Generator
    ) -> np.ndarray:
        """Index maps ``(B, K - 1, 4, 4)`` that overlap the first: of several tries at once, the first good one is used.

        ``turns (B, (K - 1) tries, 3, 3)`` are the linear maps of the first tries.
        """
        boxes = self._same_box(pairs, first)
        anchor, first = boxes.reshape(-1, 4, 4), np.repeat(first, boxes.shape[1], 0)
        n = len(anchor)
        best, lacking = anchor.copy(), np.ones(n, dtype=bool)
        affine, extent = pairs.affines[:, 1:].reshape(n, 1, 4, 4), pairs.extent[:, 1:].reshape(n, 1, 3)
        turns = turns.reshape(n, -1, 3, 3)
        # (n, 1, 3): the first view's centre in the other source
        centre = algebra.transform(anchor, self._middle[None])
        for more in (*self.OVERLAP_TRIES[1:], 0):
            if self.flip_together:
                turns = self.same_mirror(turns, first[:, None])
            linear = self.in_voxels(turns, affine)
            shift = self.draw_shift(linear.shape[:2], draws) * self.steps(affine)
            low, high = self.centre_bounds(linear, extent)
            maps = self.view_to_source(linear, np.clip(centre + shift, low, high))
            good = self._shared_part(maps, anchor[:, None]) >= self.overlap * (1 - 1e-6)
            found = lacking & good.any(1)
            best[found] = maps[found, good.argmax(1)[found]]
            lacking &= ~found
            if not more or not lacking.any():
                break
            turns = self.draw_linear((n, more), draws)
        return best.reshape(boxes.shape)

    def draw_shift(self, shape: tuple[int, ...], draws: np.random.Generator) -> np.ndarray:
        """Shifts ``(*shape, 3)`` in voxels of the views that leave two boxes the overlap."""
        reach = (1 - self.overlap ** (1 / 3)) * np.asarray(self.size)
        return (2 * draws.random((*shape, 3)) - 1) * reach

    @staticmethod
    def same_mirror(linear: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Gives linear maps ``(..., 3, 3)`` the mirror of others: the sign of their diagonals (rotations are small)."""
        wanted, own = (np.sign(matrix.diagonal(axis1=-2, axis2=-1)[..., :3]) for matrix in (first, linear))
        return linear * (wanted * own)[..., None, :]

    def _shared_part(self, maps: np.ndarray, anchor: np.ndarray) -> np.ndarray:
        """Volume of the intersection over the smaller view's."""
        between = algebra.inverse(anchor) @ maps
        return shared_volume(between, self.size) / (algebra.volume(between).clip(None, 1) * math.prod(self.size))

    def resample_views(self, batch: PairBatch, maps: np.ndarray, draws: np.random.Generator | None) -> tuple[View, ...]:
        """Resamples all sources once, through ``maps (B, K, 4, 4)``, then augments intensities."""
        if self.moving and draws is not None and batch.motion is None:
            raise InputError("views.correspondence is field, and the batch does not tell how tissue moves.")
        pairs = batch.host
        # Centred views, and visits of different voxel sizes, have a map for each visit.
        one_map = self.geometry == "shared" and draws is not None and self.spacing is None
        affines = pairs.affines @ maps
        changes = None if draws is None else self._changes(algebra.spacing(affines), draws)
        grid = geo.grid_parts(self._fine(maps[:, 0] if one_map else maps.reshape(-1, 4, 4)), batch.size, self._samples)
        parts, shown = [part.astype(np.float32) for part in grid], self._shown(batch, pairs, draws)
        return self._make(batch, pairs, Plan(affines, pairs.times_within_pair(), parts, one_map, changes, shown))

    def _shown(self, batch: PairBatch, pairs: HostPairs, draws: np.random.Generator | None) -> np.ndarray | None:
        """``(B, K, C)`` bool, the channels that the views show; ``None``: all."""
        if draws is None or self.contrasts == "same":
            return pairs.present
        every = np.ones(batch.images.shape[:3], dtype=bool)
        return draw_shown(every if pairs.present is None else pairs.present, self.contrasts, draws)

    def _make(self, batch: PairBatch, pairs: HostPairs, plan: Plan) -> tuple[View, ...]:
        """What the device does: one copy, one resampling, and the intensity changes."""
        changed = [*(plan.changes.arrays if plan.changes else []), *([] if plan.shown is None else [plan.shown])]
        affines, time, *sent = send([plan.affines, plan.times, *plan.grid, *changed], batch.images.device)
        affines, time = affines.clone(), time.clone()  # they outlive the step's other arrays
        shown = None if plan.shown is None else sent.pop().clone()
        clean = self._resample(batch.images, sent[:3], plan.one_map)
        image = clean if plan.changes is None else self._augment(clean, plan.changes, sent[3:])
        if shown is not None:  # last, as noise and bias fields would fill an empty channel
            clean, image = (each.masked_fill(~shown[..., None, None, None], 0) for each in (clean, image))
        return split_views(batch, pairs, plan, (image, clean, affines, time, shown), self.moving)

    @property
    def _samples(self) -> list[int]:
        """Samples of the source along each axis of a view."""
        return [n * k for n, k in zip(self.size, self.samples, strict=True)]

    def _fine(self, maps: np.ndarray) -> np.ndarray:
        """Index of a sample → index of the source."""
        return maps if self.samples == (1, 1, 1) else maps @ geo.within(self.samples, maps)

    def _resample(self, images: Tensor, grid: list[Tensor], one_map: bool) -> Tensor:
        """One call for ``(B, K, C, ...)``; visits on one map are channels of one sampling: 1/K of the work."""
        if one_map:
            return geo.resample_parts(images.flatten(1, 2), grid).unflatten(1, images.shape[1:3])
        views = geo.resample_parts(images.flatten(0, 1), grid)
        if self.samples != (1, 1, 1):
            views = F.avg_pool3d(views, self.samples)
        return views.unflatten(0, images.shape[:2])

    def _changes(self, spacing: np.ndarray, draws: np.random.Generator) -> Changes:
        """What intensity transforms do to views of this voxel size ``(B, K, 3)``, per pair or per view."""
        groups = spacing[:, 0] if self.intensity == "shared" else spacing.reshape(-1, 3)
        return Changes(self.transforms, groups, self.size, draws)

    def _augment(self, clean: Tensor, changes: Changes, arrays: list[Tensor]) -> Tensor:
        """Intensity transforms on ``(B, K, C, ...)``."""
        if self.intensity == "shared":
            return changes(clean, arrays)
        return changes(clean.flatten(0, 1).unsqueeze(1), arrays).squeeze(1).unflatten(0, clean.shape[:2])
