"""Errors of a matcher, measured against known correspondences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from lssl.correspondence.matchers import Matcher, full_view
from lssl.data.batch import PairBatch
from lssl.metrics import LandmarkError
from lssl.utils.distributed import no_sync
from lssl.views import geometry as geo
from lssl.views.sampler import View

__all__ = ["Truth", "displaced", "landmark_errors", "landmarks", "one_pair_per_subject"]

Truth = Callable[[Tensor, int, int], Tensor]
"""Points ``(N, 3)`` of the visit in one row of the visit table → their true positions in another row's visit, in mm."""


@torch.no_grad()
@no_sync()
def landmark_errors(
    matcher: Matcher, pairs: list[PairBatch], truth: Truth | None, points: int = 256, seed: int = 0
) -> dict[str, float]:
    """Errors of matched points across the visits of a subject, and across subjects.

    The points lie in the labelled brain of each first visit, or in its foreground without labels. The matcher searches
    for them in the second visit of the same subject and of the next subject. A known random affine displaces the
    searched visit first, so that the position in the grid gives no hint.

    Args:
        matcher: the matcher to measure.
        pairs: batches of one pair each, of different subjects (:func:`one_pair_per_subject`).
        truth: the true correspondence. ``None`` uses the common frame of a subject's visits and skips other subjects.
        points: number of points per pair of visits.
        seed: seed of the points and affines.

    Returns:
        For ``<kind>`` in ``visits`` and ``subjects``: the errors ``<kind>/median`` and ``<kind>/mean`` in mm;
        ``<kind>/kept``, the share of points with a score above 0, and their median error ``<kind>/median_kept``;
        ``<kind>/frame``, the median error of the unmatched frame coordinates. Also ``voxel``, the voxel size in mm.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = {"visits": 0, "subjects": 1} if truth is not None and len(pairs) > 1 else {"visits": 0}
    result = {"voxel": geo.spacing(pairs[0].affines).mean().item()}
    for kind, step in kinds.items():
        every, kept, still = (LandmarkError(sync_on_compute=False) for _ in range(3))
        shares = []
        for number, pair in enumerate(pairs):
            other = pairs[(number + step) % len(pairs)]
            first, second = full_view(pair, 0), displaced(full_view(other, 1), generator)
            if other is not pair:
                first = replace(first, motion=None)  # which is between the visits of a subject
            points_mm = landmarks(first, points, generator)
            rows = int(pair.session[0, 0]), int(other.session[0, 1])
            true = points_mm if truth is None else truth(points_mm[0].cpu(), *rows)[None].to(points_mm)
            found, score = matcher.match(points_mm, first, second)
            valid = second.contains(true)
            every.update(found, true, valid)
            kept.update(found, true, valid & (score > 0))
            still.update(points_mm, true, valid)
            shares.append((score[valid] > 0).float())
        result |= {f"{kind}/{name}": value.item() for name, value in every.compute().items()}
        result[f"{kind}/median_kept"] = kept.compute()["median"].item()
        result[f"{kind}/kept"] = torch.cat(shares).mean().item()
        result[f"{kind}/frame"] = still.compute()["median"].item()
    return result


def one_pair_per_subject(batches: Iterable[PairBatch], most: int) -> list[PairBatch]:
    """The first pair of two visits of each subject, as batches of one; of a series, its first and last visit."""
    pairs: dict[int, PairBatch] = {}
    for batch in (batch.ends() for batch in batches):
        for row in range(len(batch)):
            subject, sessions = int(batch.subject[row]), batch.session[row]
            if subject not in pairs and sessions[0] != sessions[1]:
                pairs[subject] = batch.rows(slice(row, row + 1))
        if len(pairs) >= most:
            break
    return list(pairs.values())[:most]


def landmarks(view: View, count: int, generator: torch.Generator) -> Tensor:
    """``(1, count, 3)`` points in mm, drawn in one visit's labelled voxels, or in its foreground without labels."""
    label = view.source_label
    inside = view.source_foreground[0] if label is None or not (label > 0).any() else label[0] > 0
    voxels = inside.nonzero()
    drawn = voxels[torch.randint(len(voxels), (count,), generator=generator).to(voxels.device)].double()
    drawn = drawn + torch.rand(count, 3, generator=generator, dtype=torch.float64).to(drawn.device) - 0.5
    return geo.transform(view.affine, drawn[None])


def displaced(
    view: View,
    generator: torch.Generator,
    rotation: float = 15.0,
    zoom: tuple[float, float] = (0.9, 1.1),
    shift: float = 0.1,
) -> View:
    """The same visit on a randomly rotated, stretched and shifted grid; the frame does not change.

    Args:
        view: full views of visits.
        generator: random numbers, on the CPU.
        rotation: largest angle in degrees about each axis.
        zoom: range of the factor of each axis.
        shift: largest shift, as a share of each side.
    """
    draws = torch.rand(3, len(view.image), 3, generator=generator, dtype=torch.float64).to(view.affine.device)
    size = torch.tensor(view.size, dtype=torch.float64, device=view.affine.device)
    linear = geo.rotation((2 * draws[0] - 1) * math.radians(rotation)) @ geo.scaling(
        zoom[0] + (zoom[1] - zoom[0]) * draws[1]
    )
    step = geo.spacing(view.affine)
    linear = geo.scaling(1 / step) @ linear @ geo.scaling(step)
    middle = ((size - 1) / 2).expand(len(draws[0]), 3)
    matrix = geo.translation((2 * draws[2] - 1) * shift * size) @ geo.about(linear, middle)
    image = geo.resample(view.image, matrix, view.size)
    return replace(view, image=image, clean=image, affine=view.affine @ matrix)
