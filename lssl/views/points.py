"""Corresponding points of two views: features of a tap at the same point of the frame."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lssl.networks.feature_geometry import Tap
from lssl.views import geometry as geo
from lssl.views.sampler import View

__all__ = ["at_points", "corresponding_points", "draw"]


def corresponding_points(
    first: View, second: View, tap: Tap, count: int, generator: torch.Generator, foreground: bool = False
) -> tuple[Tensor, Tensor]:
    """Draws features of view 1's lattice that view 2 shows too, uniformly and without replacement.

    Args:
        first: view 1, whose lattice the points lie on.
        second: view 2, whose features are interpolated there.
        tap: where the features lie.
        count: points wanted per sample; fewer if the lattice is smaller.
        generator: on the CPU.
        foreground: only points on the foreground of both views, if there are any.

    Returns:
        ``(B, K, 3)`` points in mm, and ``(B,)`` float weights: 1, or 0 for a sample without such points (its points are
        then arbitrary). A sample with fewer than K points repeats them.
    """
    size = [n // s for n, s in zip(first.size, tap.stride, strict=True)]
    count = min(count, math.prod(size))
    tries = min(8 * count, math.prod(size))
    scores = torch.rand(len(first.image), math.prod(size), generator=generator)
    index = scores.topk(tries, dim=1).indices.to(first.affine.device, non_blocking=True)
    own = geo.lattice(size, first.affine.device)[index]
    points_mm = geo.transform(geo.feature_affine(first.affine, tap.stride, tap.offset), own)
    other = geo.transform(geo.inverse(geo.feature_affine(second.affine, tap.stride, tap.offset)), points_mm)
    seen = geo.contains(other, size) & first.contains(points_mm) & second.contains(points_mm)
    if foreground:
        inside = seen & first.contains(points_mm, foreground=True) & second.contains(points_mm, foreground=True)
        seen = torch.where(inside.any(1, keepdim=True), inside, seen)
    taken = draw(seen, count)
    return points_mm.gather(1, taken[..., None].expand(-1, -1, 3)), seen.any(1).float()


def draw(valid: Tensor, count: int) -> Tensor:
    """The first ``count`` true columns of each row of ``(B, N)`` as indices ``(B, K)``, ``K = min(count, N)``.

    A row with fewer true columns repeats them; a row with none gets arbitrary indices.
    """
    order = valid.int().argsort(dim=1, descending=True, stable=True)
    found = valid.sum(1, keepdim=True).clamp_min(1)
    return order.gather(1, torch.arange(min(count, valid.shape[1]), device=order.device) % found)


def at_points(features: Tensor, view: View, tap: Tap, points: Tensor) -> Tensor:
    """Features ``(B, C, ...)`` of a tap at points ``(B, K, 3)`` of the frame, as ``(B, K, C)`` float32."""
    return geo.sample(features, geo.feature_affine(view.affine, tap.stride, tap.offset), points)
