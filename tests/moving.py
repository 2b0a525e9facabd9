"""Two views of tissue that moves, and the same views in a frame that moves with it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lssl.data.batch import PairBatch
from lssl.views import geometry as geo
from lssl.views.sampler import View, ViewSampler

#: Where tissue lies at the second visit: turned by some degrees, which changes no distance, and shifted.
PHI = geo.about(
    geo.rotation(torch.tensor([0.07, -0.1, 0.05], dtype=torch.float64)),
    torch.tensor([-20.0, 20.0, 20.0], dtype=torch.float64),
) + torch.nn.functional.pad(torch.tensor([[2.0], [-1.5], [1.0]], dtype=torch.float64), (3, 0, 0, 1))


def motion_over(affines: Tensor, size: tuple[int, int, int], phi: Tensor = PHI) -> tuple[Tensor, Tensor]:
    """Motion ``(B, 2, 3, d, h, w)`` of both visits over their boxes, with a knot at every third voxel or so."""
    counts = tuple(n // 3 + 2 for n in size)
    knots = affines @ geo.scaling(torch.full((3,), 3.0, dtype=torch.float64))
    points = geo.transform(knots, geo.lattice(counts).expand(*affines.shape[:2], -1, -1))
    maps = torch.stack([phi, torch.linalg.inv(phi)]).expand(*affines.shape)
    shift = (geo.transform(maps, points) - points).transpose(-1, -2)
    return shift.unflatten(-1, counts).float(), knots


def drawn(batch: PairBatch, sampler: ViewSampler, seed: int = 1) -> tuple[tuple[View, View], tuple[View, View]]:
    """Views whose frame tells where tissue lies, and the same views where the tissue of the second visit has moved."""
    first, second = sampler(batch, torch.Generator().manual_seed(seed))
    return (first, second), frame_moved(first, second, batch)


def frame_moved(first: View, second: View, batch: PairBatch) -> tuple[View, View]:
    """The second visit recorded elsewhere, as its tissue has moved by :data:`PHI`, and motion that tells so."""
    affines = torch.stack([batch.affines[:, 0], PHI @ batch.affines[:, 1]], 1)
    motion, knots = motion_over(affines, batch.size)
    moved = dataclasses.replace(second, affine=PHI @ second.affine, source_affine=PHI @ second.source_affine)
    return tuple(
        dataclasses.replace(view, motion=motion[:, n], motion_affine=knots[:, n])
        for n, view in enumerate((first, moved))
    )  # type: ignore[return-value]
