"""Features as colours: the first three principal components at each tap, alike for both visits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lssl.pictures.scene import Scene, index_of
from lssl.task import Task
from lssl.utils.canvas import caption, figure, show
from lssl.views import geometry as geo

__all__ = ["draw_features", "principal_colours"]


def principal_colours(features: Tensor, inside: Tensor) -> tuple[Tensor, float]:
    """Maps features to red, green and blue: the first three principal components of the foreground of all images.

    Each runs from its 2nd to its 98th percentile; its sign makes its largest weight positive, so that one network
    always gets the same colours.

    Args:
        features: ``(B, C, ...)``.
        inside: ``(B, 1, ...)`` bool.

    Returns:
        ``(B, 3, ...)`` in [0, 1], and the share of the variance that the three explain.
    """
    rows = features.double().movedim(1, -1)
    mean = rows[inside[:, 0]].mean(0)
    _, size, axes = torch.linalg.svd(rows[inside[:, 0]] - mean, full_matrices=False)
    axes = axes[:3] * axes[:3].gather(1, axes[:3].abs().argmax(1, keepdim=True)).sign()
    axes = F.pad(axes, (0, 0, 0, 3 - len(axes)))  # where there are fewer than three channels
    parts = (rows - mean) @ axes.T
    low, high = torch.quantile(parts[inside[:, 0]], torch.tensor([0.02, 0.98]).to(parts), dim=0)
    colours = ((parts - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    share = size[:3].square().sum() / size.square().sum().clamp_min(1e-300)
    return colours.movedim(-1, 1).float(), float(share)


@torch.no_grad()
def draw_features(task: Task, shown: Scene, path: Path, taps: list[str] | None = None) -> None:
    """Both visits (rows) and what each tap makes of them (columns), cut through the marked place.

    Args:
        task: whose backbone is shown.
        shown: the pair.
        path: PNG.
        taps: which; ``None`` takes all.
    """
    names = list(task.backbone.taps) if taps is None else taps
    training = task.training
    task.eval()
    features = task.backbone(torch.cat([visit.image for visit in shown.visits]), names)
    task.train(training)
    title = "Features as colours: three principal components of both visits' foreground"
    with figure(path, 2, 1 + len(names), title, panel=2.6) as axes:
        for row, visit in enumerate(shown.visits):
            point, affine = index_of(shown.place, visit.affine), visit.affine[0].cpu().numpy()
            show(axes[row, 0], visit.picture(), affine, point, f"visit {row + 1}")
        for column, name in enumerate(names, 1):
            _draw_tap(axes[:, column], task, shown, name, features[name].float())


def _draw_tap(axes: np.ndarray, task: Task, shown: Scene, name: str, features: Tensor) -> None:
    tap = task.backbone.taps[name]
    foreground = torch.cat([visit.foreground for visit in shown.visits])
    inside = F.adaptive_avg_pool3d(foreground, features.shape[2:]) > 0.5  # type: ignore[arg-type]
    if not inside.any() or not features.isfinite().all():
        for axis in axes:
            caption(axis, f"{name}: nothing to show")
        return
    colours, share = principal_colours(features, inside)
    affine = torch.cat([visit.affine for visit in shown.visits])
    size = shown.visits[0].size
    grid = geo.inverse(geo.feature_affine(affine, tap.stride, tap.offset)) @ affine
    colours = geo.resample(colours, grid, size, mode="nearest", padding="border") * (0.25 + 0.75 * foreground)
    for row, axis in enumerate(axes):
        point = index_of(shown.place, affine[row : row + 1])
        volume = colours[row].movedim(0, -1).cpu().numpy()
        text = f"{name} ({tap.channels} channels, {share:.0%} shown)" if row == 0 else ""
        show(axis, volume, affine[row].cpu().numpy(), point, text)
