"""Pictures: slices of visits and views through a point, drawn so that one can see what a network compares.

Slices are axial, in radiological convention: the viewer looks from the feet, so the patient's right is on the left;
anterior is up. All arrays are in canonical orientation (first axis to the right, second to the front, third up).
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lssl import geometry as geo
from lssl.batch import PairBatch
from lssl.points import at_points
from lssl.strategy import Strategy
from lssl.views import View

__all__ = ["axial", "draw_similarity", "similarity_map"]


def axial(volume: Tensor, index: int) -> np.ndarray:
    """Axial slice ``(D, H, W) → (H, D)`` image, patient's right on the left, anterior up."""
    return volume[:, :, index].T.flip(0, 1).float().cpu().numpy()


def _spot(volume: Tensor, point: Tensor) -> tuple[float, float]:
    """Where an index lies on :func:`axial`."""
    return volume.shape[0] - 1 - float(point[0]), volume.shape[1] - 1 - float(point[1])


def _show(
    axes: Axes, volume: Tensor, point: Tensor, title: str, mark: str | None = "#ffcc00", sides: bool = True
) -> None:
    index = int(point[2].round().clamp(0, volume.shape[2] - 1))
    axes.imshow(axial(volume, index), cmap="gray", vmin=0, vmax=1.1, interpolation="nearest")
    if mark:
        axes.plot(*_spot(volume, point), "+", color=mark, markersize=14, markeredgewidth=2)
    _finish(axes, title, sides)


def _finish(axes: Axes, title: str, sides: bool) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    for x, text in ((0.02, "R"), (0.94, "L")) if sides else ():  # a view may be mirrored or turned
        axes.text(x, 0.5, text, transform=axes.transAxes, color="#ffcc00", fontsize=9, va="center")


def _outline(axes: Axes, volume: Tensor, source_affine: Tensor, view: View, point: Tensor, colour: str) -> None:
    """The view's cut with this slice: the zero line of the signed distance to the view's nearest face."""
    size = volume.shape
    plane = geo.lattice((size[0], size[1], 1), source_affine.device)
    plane[:, 2] = point[2].round()
    index = geo.transform(geo.inverse(view.affine) @ source_affine, plane[None])[0]
    half = torch.tensor(view.size, dtype=index.dtype, device=index.device) / 2
    depth = (half - (index + 0.5 - half).abs()).amin(-1).view(size[0], size[1], 1)
    axes.contour(axial(depth, 0), [0.0], colors=[colour], linewidths=1.5)


@torch.no_grad()
def similarity_map(strategy: Strategy, batch: PairBatch, tap: str, number: int = 0) -> dict[str, Tensor | View]:
    """One marked voxel of an augmented view of the first visit, compared with all of the second visit.

    The features are the tap's, centred on their mean over the second visit's foreground, so that what all voxels share
    does not count. Everything depends on ``number`` and the batch alone, so that two networks can be shown the same.
    """
    training = strategy.training
    strategy.eval()
    batch = batch.to(strategy.device)
    where = strategy.backbone.taps[tap]
    strategy.seed("val", number)
    views = copy.copy(strategy.views)
    views.flip = (0.0, 0.0, 0.0)  # a mirrored voxel's match is the mirrored place: right, but confusing to look at
    first, second = views(batch, strategy.generator)
    features = strategy.backbone(first.image, [tap])[tap]
    whole, others = _whole(strategy, batch, tap)
    strategy.train(training)
    place = _landmark(first, whole)
    inside = F.interpolate(whole.foreground, others.shape[2:], mode="area") + 1e-6
    mean = (others * inside).sum((2, 3, 4), keepdim=True) / inside.sum((2, 3, 4), keepdim=True)
    query = at_points(features, first, where, place[:, None])[:, 0] - mean[..., 0, 0, 0]
    similarity = F.cosine_similarity(others - mean, query[:, :, None, None, None], dim=1)
    grid = geo.inverse(geo.feature_affine(whole.affine, where.stride, where.offset)) @ whole.affine
    similarity = geo.resample(similarity.unsqueeze(1), grid, whole.size, padding="border")[:, 0]
    return {"similarity": similarity, "place": place, "first": first, "second": second, "whole": whole}


def _whole(strategy: Strategy, batch: PairBatch, tap: str) -> tuple[View, Tensor]:
    """As much of the second visit as the strides allow, with features; a view if the network takes no other size."""
    strides = torch.tensor([t.stride for t in strategy.backbone.taps.values()]).amax(0)
    views = copy.copy(strategy.views)
    most = torch.tensor(batch.images.shape[-3:]) // strides * strides
    views.size = (int(most[0]), int(most[1]), int(most[2]))
    try:
        _, whole = views.centred(batch)
        return whole, strategy.backbone(whole.image, [tap])[tap].float()
    except (RuntimeError, ValueError, AssertionError):
        _, whole = strategy.views.centred(batch)
        return whole, strategy.backbone(whole.image, [tap])[tap].float()


def _landmark(first: View, whole: View) -> Tensor:
    """A place ``(B, 3)`` to mark: where edges are strong near the middle of what both views show."""
    points = geo.transform(whole.affine, geo.lattice(whole.size, whole.affine.device))
    image = whole.image[:, :1].float()
    gradient = sum(torch.gradient(F.avg_pool3d(image, 3, 1, 1), dim=axis)[0].abs() for axis in (2, 3, 4))
    away = (geo.lattice(whole.size, whole.affine.device) - (torch.tensor(whole.size) - 1) / 2).abs()
    central = (away < torch.tensor(whole.size) * torch.tensor([0.25, 0.25, 0.15])).all(-1)
    index = geo.transform(geo.inverse(first.affine), points)
    score = torch.as_tensor(gradient).flatten(1) * central
    score = score * geo.contains(index, first.size, 3.0) * (whole.foreground.flatten(1) > 0.5)
    best = score.argmax(1)
    return points[torch.arange(len(points), device=best.device), best]


def draw_similarity(batch: PairBatch, maps: dict[str, dict], path: Path, tap: str, sample: int = 0) -> None:
    """Two visits with the view boxes, the two views, and the similarity of the marked voxel for each network.

    Args:
        batch: the pairs.
        maps: title → what :func:`similarity_map` gave for that network.
        path: PNG to write.
        tap: named in the picture.
        sample: which pair of the batch.
    """
    shown = next(iter(maps.values()))
    place = shown["place"][sample : sample + 1, None]

    def index(affine: Tensor) -> Tensor:
        return geo.transform(geo.inverse(affine[sample : sample + 1]), place)[0, 0]

    with mpl.rc_context({"font.family": "DejaVu Sans", "axes.edgecolor": "#888888"}):
        figure = Figure(figsize=(4 * (2 + (len(maps) + 1) // 2), 8.4), facecolor="white", layout="constrained")
        axes = figure.subplots(2, 2 + (len(maps) + 1) // 2, squeeze=False)
        for visit, view, colour in ((0, "first", "#33bbee"), (1, "second", "#ee7733")):
            affine = batch.affines[:, visit]
            volume, point = batch.images[sample, visit, 0], index(affine)
            age = float(batch.ages[sample, visit])
            title = f"visit {visit + 1}" + (f", age {age:.1f}" if age == age else "") + ", with view box"
            _show(axes[visit, 0], volume, point, title)
            one = _only(shown[view], sample)
            _outline(axes[visit, 0], volume, affine[sample : sample + 1], one, point, colour)
            title = f"view {visit + 1}, as the network sees it"
            _show(axes[visit, 1], one.image[0, 0], index(shown[view].affine), title, sides=False)
        for axis, (title, result) in zip(axes[:, 2:].T.flatten(), maps.items(), strict=False):
            _draw_map(axis, result, index(result["whole"].affine), title, tap, sample)
        figure.suptitle("Similarity of one voxel of view 1 (+) to every voxel of visit 2")
        figure.savefig(path, dpi=80)


def _draw_map(axis: Axes, result: dict, point: Tensor, title: str, tap: str, sample: int) -> None:
    whole, similarity = result["whole"], result["similarity"][sample]
    _show(axis, whole.image[sample, 0], point, f"{title}: cosine at {tap}, visit 2", mark=None)
    index = int(point[2].round().clamp(0, similarity.shape[2] - 1))
    drawn = axis.imshow(axial(similarity, index), cmap="magma", vmin=0, vmax=1, alpha=0.75)
    axis.plot(*_spot(similarity, point), "+", color="#33dd55", markersize=14, markeredgewidth=2)
    axis.figure.colorbar(drawn, ax=axis, shrink=0.8)


def _only(view: View, sample: int) -> View:
    """One sample of a view."""
    fields: dict[str, Any] = {field.name: getattr(view, field.name) for field in dataclasses.fields(view)}
    kept: dict[str, Any] = {name: None if v is None else v[sample : sample + 1] for name, v in fields.items()}
    return View(**kept)
