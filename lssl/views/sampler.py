"""Views: augmented crops of visits, each made by ONE resampling, with a matrix of its exact position.

Published code crops, flips and rotates one after another and replays the steps. Here all parameters are drawn first and
composed into one 4×4 matrix per view; the source is interpolated once. Image and matrix agree by construction, so the
correspondence between two views is exact to rounding error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lssl.data.batch import PairBatch
from lssl.data.spacing import TOLERANCE
from lssl.utils.errors import InputError, positive
from lssl.views import geometry as geo
from lssl.views.intensity import IntensityTransform, default_transforms
from lssl.views.overlap import shared_volume

__all__ = ["View", "ViewSampler"]


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

    def contains(self, points: Tensor, foreground: bool = False) -> Tensor:
        """Which points ``(B, N, 3)`` of the frame the view shows from real data (if asked, from the foreground)."""
        seen = geo.contains(geo.transform(geo.inverse(self.affine), points), self.size, -0.5)
        in_source = geo.transform(geo.inverse(self.source_affine), points)
        seen &= geo.contains(in_source, self.source_extent[:, None])  # the source fades to 0 beyond its last voxels
        if foreground:
            seen &= geo.sample_nearest(self.source_foreground, self.source_affine, points, 0)
        return seen


class ViewSampler:
    """Draws the two views of each pair, batched, on the batch's device.

    Geometry of one view, from its own index ``v`` to the source's index: ``c + L (v - (n - 1)/2)`` with
    ``L = diag(1/s) R diag(w z) F``: mirror F, zoom z and rotation R act in mm about a centre ``c`` that keeps the box
    inside the source where it fits. ``s`` is the source's voxel size and ``w`` the working spacing, which is the same
    for all visits; within 1 % of it, and without one, ``w = s``.

    ``geometry = "shared"`` uses one index map for both visits, as published; if their voxel sizes differ, one box in
    mm. ``"independent"`` draws a second one whose centre is shifted, so that a voxel's place in the crop says nothing
    about its match: networks otherwise read their position off the padding and learn nothing.

    Args:
        size: side(s) of the views in voxels of the working spacing.
        spacing: working spacing of all visits in mm, along one axis each or the same along all. ``None``: the median
            voxel size of the training visits, which the task sets; a checkpoint keeps it.
        same_visit: probability that both views of a pair show one visit, either of the two, instead of one each.
        geometry: ``independent`` (recommended) or ``shared`` (as in Ren et al., 2022).
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
    """

    CENTRE_TRIES = 32
    OVERLAP_TRIES = 16

    def __init__(
        self,
        size: int | tuple[int, int, int] = 96,
        spacing: float | tuple[float, float, float] | None = None,
        same_visit: float = 0.0,
        geometry: Literal["independent", "shared"] = "independent",
        intensity: Literal["independent", "shared"] = "independent",
        overlap: float = 0.5,
        zoom: tuple[float, float] = (0.8, 1.2),
        rotation: float = 10.0,
        affine_probability: float = 0.5,
        flip: tuple[float, float, float] = (0.5, 0.0, 0.0),
        flip_together: bool = True,
        foreground: bool = True,
        transforms: list[IntensityTransform] | None = None,
    ) -> None:
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
        self.same_visit = same_visit
        self.geometry, self.intensity = geometry, intensity
        self.overlap, self.zoom, self.rotation = overlap, zoom, math.radians(rotation)
        self.affine_probability, self.flip, self.flip_together = affine_probability, flip, flip_together
        self.foreground = foreground
        self.transforms = default_transforms() if transforms is None else transforms

    def __call__(self, batch: PairBatch, generator: torch.Generator) -> tuple[View, View]:
        """Two views per pair; all randomness comes from ``generator``, which lives on the CPU."""
        self.check(batch)
        batch = self._choose_visits(batch, generator)
        linear = self.draw_linear(len(batch), generator, batch.affines.device)
        first = self._anywhere(batch, 0, self.in_voxels(linear, batch.affines[:, 0]), generator)
        shared = self.geometry == "shared"
        second = self._same_map(batch, first) if shared else self._place_second(batch, first, generator)
        return self.resample_views(batch, torch.stack([first, second], 1), generator)

    def _choose_visits(self, batch: PairBatch, generator: torch.Generator) -> PairBatch:
        if not self.same_visit:
            return batch
        one = torch.rand(len(batch), 1, generator=generator) < self.same_visit
        either = torch.randint(2, (len(batch), 1), generator=generator)
        return batch.visits(torch.where(one, either, torch.tensor([0, 1])).to(batch.images.device, non_blocking=True))

    def centred(self, batch: PairBatch) -> tuple[View, View]:
        """Unaugmented views of one box, at the centre of the first visit's foreground, for evaluation."""
        self.check(batch)
        plain = geo.scaling(self.steps(batch.affines[:, 0]))
        low, high = self.centre_bounds(plain, batch.extent[:, 0])
        middle = self._middle(low)
        centre = (geo.centre_of_mass(batch.foreground[:, 0]) - middle).round() + middle
        first = self.view_to_source(plain, centre.clamp(low, high))
        return self.resample_views(batch, torch.stack([first, self._same_box(batch, first)], 1), None)

    def check(self, batch: PairBatch) -> None:
        """Refuses sources that are smaller than the views; with a working spacing, the data's own check does."""
        if self.spacing is not None:
            return
        have = tuple(batch.images.shape[-3:])
        if any(want > got for want, got in zip(self.size, have, strict=True)):
            raise InputError(
                f"views: a crop of {self.size} voxels does not fit into sources of {have}; use a smaller crop."
            )

    def draw_linear(self, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """``R diag(z) F`` in mm as ``(count, 4, 4)`` linear maps."""

        def uniform(low: float, high: float) -> Tensor:
            return torch.rand(count, 3, generator=generator, dtype=torch.float64) * (high - low) + low

        zoom, angles = uniform(*self.zoom), uniform(-self.rotation, self.rotation)
        still = torch.rand(count, 1, generator=generator) >= self.affine_probability
        zoom, angles = zoom.masked_fill(still, 1.0), angles.masked_fill(still, 0.0)
        mirror = torch.rand(count, 3, generator=generator) < torch.tensor(self.flip)
        signs = 1 - 2 * mirror.double()
        return (geo.rotation(angles) @ geo.scaling(zoom * signs)).to(device, non_blocking=True)

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

    def steps(self, affine: Tensor) -> Tensor:
        """Voxels of the source in a view voxel, ``(..., 3)``; exactly 1 within 1 % of the working spacing."""
        own = geo.spacing(affine)
        if self.spacing is None:
            return torch.ones_like(own)
        steps = torch.tensor(self.spacing, dtype=own.dtype, device=own.device) / own
        return torch.where((steps - 1).abs() < TOLERANCE, 1.0, steps)

    def in_voxels(self, linear: Tensor, affine: Tensor) -> Tensor:
        """``L``: a map of view indices from a linear map in mm along the source's axes."""
        own = geo.spacing(affine)
        return geo.scaling(1 / own) @ linear @ geo.scaling(own * self.steps(affine))

    def view_to_source(self, linear: Tensor, centre: Tensor) -> Tensor:
        """View index → source index: ``c + L (v - (n - 1)/2)``."""
        return geo.translation(centre) @ linear @ geo.translation(-self._middle(centre).expand_as(centre))

    def _middle(self, like: Tensor) -> Tensor:
        return (torch.tensor(self.size, dtype=like.dtype, device=like.device) - 1) / 2

    @staticmethod
    def _same_box(batch: PairBatch, first: Tensor) -> Tensor:
        """The map into the second source that shows the same box of the frame."""
        return geo.inverse(batch.affines[:, 1]) @ batch.affines[:, 0] @ first

    def _same_map(self, batch: PairBatch, first: Tensor) -> Tensor:
        """The first map; for pairs whose voxel sizes differ, the map to the same box."""
        if self.spacing is None:
            return first
        one, other = geo.spacing(batch.affines).unbind(1)
        alike = (one / other - 1).abs().amax(-1) < TOLERANCE
        return torch.where(alike[:, None, None], first, self._same_box(batch, first))

    def centre_bounds(self, linear: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
        """Centres ``(B, 3)`` that keep the view's box inside the source; the source's middle if it does not fit."""
        size = torch.tensor(self.size, dtype=linear.dtype, device=linear.device)
        half = (linear[..., :3, :3].abs() @ (size / 2)[:, None]).squeeze(-1)
        low, high = half - 0.5, extent - 0.5 - half
        middle = (extent - 1) / 2.0
        fits = low <= high
        return torch.where(fits, low, middle), torch.where(fits, high, middle)

    def _anywhere(self, batch: PairBatch, visit: int, linear: Tensor, generator: torch.Generator) -> Tensor:
        """Puts views at random centres of one visit's source, on the foreground if requested."""
        low, high = self.centre_bounds(linear, batch.extent[:, visit])
        tries = self.CENTRE_TRIES if self.foreground else 1
        draws = torch.rand(len(batch), tries, 3, generator=generator, dtype=torch.float64).to(low.device)
        centres = low[:, None] + draws * (high - low)[:, None]
        if self.foreground:
            index = centres.round().long().clamp_min(0)
            rows = torch.arange(len(batch), device=low.device)[:, None]
            hit = batch.foreground[:, visit][rows, index[..., 0], index[..., 1], index[..., 2]]
            centres = centres[rows[:, 0], hit.int().argmax(1)]  # the first hit, or the first draw without a hit
        else:
            centres = centres[:, 0]
        return self.view_to_source(linear, centres)

    def _place_second(self, batch: PairBatch, first: Tensor, generator: torch.Generator) -> Tensor:
        """A second index map that overlaps the first: draws several tries at once and takes the first good one."""
        tries, n = self.OVERLAP_TRIES, len(batch)
        linear = self.draw_linear(n * tries, generator, first.device).unflatten(0, (n, tries))
        if self.flip_together:
            linear = self.same_mirror(linear, first[:, None])
        linear = self.in_voxels(linear, batch.affines[:, None, 1])
        anchor = self._same_box(batch, first)
        centre = geo.transform(
            anchor, self._middle(first)[None, None]
        )  # (B, 1, 3): the first view's centre in the second source
        shift = self.draw_shift((n, tries), generator).to(centre.device) * self.steps(batch.affines[:, None, 1])
        low, high = self.centre_bounds(linear, batch.extent[:, 1, None])
        maps = self.view_to_source(linear, (centre + shift).clamp(low, high))
        good = self._shared_part(maps, anchor[:, None]) >= self.overlap * (1 - 1e-6)
        best = maps[torch.arange(n, device=maps.device), good.int().argmax(1)]
        return torch.where(good.any(1)[:, None, None], best, anchor)

    def draw_shift(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Shifts ``(*shape, 3)`` in voxels of the views, on the CPU, that leave two boxes the overlap."""
        reach = (1 - self.overlap ** (1 / 3)) * torch.tensor(self.size, dtype=torch.float64)
        return (2 * torch.rand(*shape, 3, generator=generator, dtype=torch.float64) - 1) * reach

    @staticmethod
    def same_mirror(linear: Tensor, first: Tensor) -> Tensor:
        """Gives linear maps the mirror of another: the sign of its diagonal (rotations are small)."""
        wanted = first[..., :3, :3].diagonal(dim1=-2, dim2=-1).sign()
        signs = wanted * linear[..., :3, :3].diagonal(dim1=-2, dim2=-1).sign()
        return linear @ geo.scaling(signs)

    def _shared_part(self, maps: Tensor, anchor: Tensor) -> Tensor:
        """Volume of the intersection over the smaller view's."""
        shared = shared_volume(geo.inverse(anchor) @ maps, self.size) * geo.volume(anchor)
        return shared / (torch.minimum(geo.volume(maps), geo.volume(anchor)) * math.prod(self.size))

    def resample_views(self, batch: PairBatch, maps: Tensor, generator: torch.Generator | None) -> tuple[View, View]:
        """Resamples both sources once, through ``maps (B, 2, 4, 4)``, then augments intensities."""
        # Centred views, and visits of different voxel sizes, have a map for each visit.
        one_map = self.geometry == "shared" and generator is not None and self.spacing is None
        clean = self._resample(batch.images, maps, one_map)
        affines = batch.affines @ maps
        image = clean if generator is None else self._augment(clean, geo.spacing(affines), generator)
        times = batch.times_within_pair()
        views = [
            View(
                image=image[:, visit],
                clean=clean[:, visit],
                affine=affines[:, visit],
                source_affine=batch.affines[:, visit],
                source_extent=batch.extent[:, visit],
                source_foreground=batch.foreground[:, visit],
                age=batch.ages[:, visit],
                time=times[:, visit],
                source_label=None if batch.labels is None else batch.labels[:, visit],
            )
            for visit in range(2)
        ]
        return views[0], views[1]

    def _resample(self, images: Tensor, maps: Tensor, one_map: bool) -> Tensor:
        """One call for ``(B, 2, C, ...)``; two visits on one map are channels of one sampling: half the work."""
        if one_map:
            return geo.resample(images.flatten(1, 2), maps[:, 0], self.size).unflatten(1, images.shape[1:3])
        views = geo.resample_mean(images.flatten(0, 1), maps.flatten(0, 1), self.size, self.samples)
        return views.unflatten(0, maps.shape[:2])

    def _augment(self, clean: Tensor, spacing: Tensor, generator: torch.Generator) -> Tensor:
        """Intensity transforms on ``(B, 2, C, ...)``, drawn per pair or per view."""
        shared = self.intensity == "shared"
        images = clean if shared else clean.flatten(0, 1).unsqueeze(1)
        spacing = spacing[:, 0] if shared else spacing.flatten(0, 1)
        for change in self.transforms:
            images = change(images, spacing, generator)
        return images if shared else images.squeeze(1).unflatten(0, clean.shape[:2])
