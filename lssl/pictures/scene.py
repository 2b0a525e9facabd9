"""What pictures show of a pair: its visits, two views, and a place that both views show."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor

from lssl.data.batch import PairBatch
from lssl.task import Task
from lssl.utils.canvas import cut, show
from lssl.views import geometry as geo
from lssl.views.sampler import View

__all__ = ["Scene", "draw_pair", "index_of", "outline", "scene"]


@dataclass
class Scene:
    """One pair.

    Attributes:
        visits: both visits, as much of them as the network's strides allow, unaugmented.
        first: view 1 of the first visit, augmented.
        second: view 2 of the second visit, augmented.
        place: ``(1, 3)`` mm, to be marked: where edges are strong near the middle of what both views show.
    """

    visits: tuple[View, View]
    first: View
    second: View
    place: Tensor


def scene(task: Task, batch: PairBatch, number: int = 0) -> Scene:
    """The first pair of a batch; depends on the batch and ``number`` alone, not on the network."""
    pair = batch.rows(slice(0, 1)).to(task.device)
    task.seed("val", number)
    views = copy.copy(task.views)
    views.flip = (0.0, 0.0, 0.0)  # a mirrored voxel's match is the mirrored place: right, but confusing to look at
    views.same_visit = 0.0
    first, second = views(pair, task.generator)
    visits = _visits(task, pair)
    return Scene(visits, first, second, _landmark(first, second, visits[1]))


def index_of(place: Tensor, affine: Tensor) -> list[float]:
    """Index of a place ``(1, 3)`` on the grid of an affine ``(1, 4, 4)``."""
    return geo.transform(geo.inverse(affine), place[:, None])[0, 0].tolist()


def draw_pair(axes: np.ndarray, shown: Scene, plane: int = 0) -> None:
    """Left: the visits with the views' boxes; right: the views as the network sees them."""
    for visit, view, colour in ((0, shown.first, "#33bbee"), (1, shown.second, "#ee7733")):
        whole, (left, right) = shown.visits[visit], axes[visit]
        age = float(whole.age[0])
        text = f"visit {visit + 1}" + (f", age {age:.1f}" if age == age else "") + ", with view box"
        point, affine = index_of(shown.place, whole.affine), whole.affine[0].cpu().numpy()
        show(left, whole.picture(), affine, point, text, plane)
        outline(left, whole, view, point, colour, plane)
        text = f"view {visit + 1}, as the network sees it"
        seen, matrix = view.picture(), view.affine[0].cpu().numpy()
        show(right, seen, matrix, index_of(shown.place, view.affine), text, plane)


def outline(axes: Axes, visit: View, view: View, point: list[float], colour: str, plane: int = 0) -> None:
    """The view's cut with this slice: the zero line of the signed distance to the view's nearest face."""
    index = geo.transform(geo.inverse(view.affine) @ visit.affine, geo.lattice(visit.size, visit.affine.device)[None])[
        0
    ]
    half = torch.tensor(view.size, dtype=index.dtype, device=index.device) / 2
    depth = (half - (index + 0.5 - half).abs()).amin(-1).view(visit.size).cpu().numpy()
    inside = cut(depth, point, plane)
    if np.ptp(np.sign(inside)):
        axes.contour(inside, [0.0], colors=[colour], linewidths=1.5)


def _visits(task: Task, pair: PairBatch) -> tuple[View, View]:
    """As much of the visits as the strides allow; views if the network takes no other size."""
    strides = torch.tensor([tap.stride for tap in task.backbone.taps.values()]).amax(0)
    views = copy.copy(task.views)
    most = torch.tensor(pair.images.shape[-3:]) // strides * strides
    views.size = (int(most[0]), int(most[1]), int(most[2]))
    whole = views.centred(pair)
    training = task.training
    task.eval()
    try:
        task.backbone(whole[0].image, list(task.backbone.taps)[-1:])
    except (RuntimeError, ValueError, AssertionError):
        whole = task.views.centred(pair)
    finally:
        task.train(training)
    return whole


def _landmark(first: View, second: View, visit: View) -> Tensor:
    points = geo.transform(visit.affine, geo.lattice(visit.size, visit.affine.device))
    image = visit.image[:, :1].float()
    gradient = sum(torch.gradient(F.avg_pool3d(image, 3, 1, 1), dim=axis)[0].abs() for axis in (2, 3, 4))
    size = torch.tensor(visit.size, device=points.device)
    away = (geo.lattice(visit.size, points.device) - (size - 1) / 2).abs()
    central = (away < size * torch.tensor([0.25, 0.25, 0.15], device=points.device)).all(-1)
    score = torch.as_tensor(gradient).flatten(1) * central * (visit.foreground.flatten(1) > 0.5)
    for view in (first, second):
        score = score * geo.contains(geo.transform(geo.inverse(view.affine), points), view.size, 3.0)
    return points[:, score[0].argmax()]
