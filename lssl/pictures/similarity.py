"""Similarity of one marked voxel to the whole other visit, for one network or several."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lssl.pictures.scene import Scene, draw_pair, index_of
from lssl.task import Task
from lssl.utils.canvas import figure, show
from lssl.views import geometry as geo
from lssl.views.points import at_points

__all__ = ["draw_similarity", "similarity_map"]


@torch.no_grad()
def similarity_map(task: Task, shown: Scene, tap: str) -> tuple[Scene, Tensor]:
    """One marked voxel of an augmented view of the first visit, compared with all of the second visit.

    The features are the tap's, centred on their mean over the second visit's foreground, so that what all voxels share
    does not count.

    Returns:
        What was shown, and the cosine at every voxel of the second visit, ``(D, H, W)``.
    """
    training = task.training
    task.eval()
    where = task.backbone.taps[tap]
    features = task.backbone(shown.first.image, [tap])[tap]
    others = task.backbone(shown.visits[1].image, [tap])[tap].float()
    task.train(training)
    whole = shown.visits[1]
    inside = F.interpolate(whole.foreground, others.shape[2:], mode="area") + 1e-6
    mean = (others * inside).sum((2, 3, 4), keepdim=True) / inside.sum((2, 3, 4), keepdim=True)
    query = at_points(features, shown.first, where, shown.place[:, None])[:, 0] - mean[..., 0, 0, 0]
    similarity = F.cosine_similarity(others - mean, query[:, :, None, None, None], dim=1)
    grid = geo.inverse(geo.feature_affine(whole.affine, where.stride, where.offset)) @ whole.affine
    return shown, geo.resample(similarity.unsqueeze(1), grid, whole.size, padding="border")[0, 0]


def draw_similarity(maps: dict[str, tuple[Scene, Tensor]], path: Path, tap: str) -> None:
    """Two visits with the view boxes, the two views, and the similarity of the marked voxel for each network.

    Args:
        maps: title → what :func:`similarity_map` gave for that network.
        path: PNG to write.
        tap: named in the picture.
    """
    shown = next(iter(maps.values()))[0]
    title = "Similarity of one voxel of view 1 (+) to every voxel of visit 2"
    with figure(path, 2, 2 + (len(maps) + 1) // 2, title, panel=4.0) as axes:
        draw_pair(axes[:, :2], shown)
        for axis, (name, (other, similarity)) in zip(axes[:, 2:].T.flatten(), maps.items(), strict=False):
            whole = other.visits[1]
            point, affine = index_of(other.place, whole.affine), whole.affine[0].cpu().numpy()
            show(axis, whole.image[0, 0].cpu().numpy(), affine, point, mark=None)
            values = similarity.cpu().numpy()
            text = f"{name}: cosine at {tap}, visit 2"
            drawn = show(axis, values, affine, point, text, mark="#33dd55", cmap="magma", vmin=0, vmax=1, alpha=0.75)
            axis.figure.colorbar(drawn, ax=axis, shrink=0.8)
        for axis in axes[:, 2:].T.flatten()[len(maps) :]:
            axis.set_axis_off()
