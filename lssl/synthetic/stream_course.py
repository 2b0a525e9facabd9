"""The course of one subject of the stream: its shape, and how it differs between two visits.

A frame point ``x`` (mm, RAS+) shows in visit ``v`` what the anatomy's map has at

    X_v(x) = ψ_v( L (x + d_v(x)) ),        ψ_v(X) = X + Σ_k α_vk w_k(X)

``L`` turns, scales and may mirror; ``d`` is a free-form deformation (see `splines`); ``α`` follows from the subject's
yearly rates, as in `label_map_subject`. On the grid of a visit, ``X_v`` is computed on nodes of about 4 mm and
interpolated trilinearly between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lssl.synthetic.draws import turn, uniform
from lssl.synthetic.label_map_anatomy import AGEING
from lssl.synthetic.label_map_subject import LONGEST, LONGEST_FAST, RATES
from lssl.synthetic.splines import INJECTIVE, basis, bump, evaluate
from lssl.synthetic.stream_anatomy import Anatomy

__all__ = ["Course", "draw_course"]

_NODES, _DELTA = 13, 32.0  # the lattice reaches 160 mm in every direction
_STEP = 4.0  # mm between nodes on which positions are computed


@dataclass(frozen=True, eq=False)
class Course:
    """One subject at two visits.

    Attributes:
        anatomy: its map.
        linear: ``(3, 3)`` float64 frame → map frame.
        coefficients: ``(2, 3, 13, 13, 13)`` mm, of the free-form deformation at each visit.
        amplitudes: ``(2, K)`` mm, of the anatomy's fields at each visit.
        ages: years at each visit.
    """

    anatomy: Anatomy
    linear: Tensor
    coefficients: Tensor
    amplitudes: Tensor
    ages: tuple[float, float]

    def positions(self, visit: int, axes: Sequence[Tensor]) -> Tensor:
        """``(D, H, W, 3)`` map frame positions in mm of the nodes of a grid, given by its axes."""
        bases = [basis(axis / _DELTA + (_NODES - 1) / 2, _NODES) for axis in axes]
        moved = evaluate(self.coefficients[visit], bases) + torch.stack(torch.meshgrid(*axes, indexing="ij"))
        flat = moved.flatten(1).T @ self.linear.to(moved.dtype).T
        return self.anatomy.pull(flat, self.amplitudes[visit]).view(*moved.shape[1:], 3)

    def sampling_grid(self, visit: int, corner: Tensor, size: tuple[int, int, int], spacing: float) -> Tensor:
        """``(1, D, H, W, 3)`` where `grid_sample` finds each voxel of a visit in the map.

        Args:
            visit: 0 or 1.
            corner: ``(3,)`` mm, centre of the first voxel.
            size: voxels.
            spacing: mm.
        """
        counts = [math.ceil((length - 1) * spacing / _STEP) + 1 for length in size]
        axes = [
            start + torch.linspace(0, (length - 1) * spacing, count)
            for start, length, count in zip(corner.float(), size, counts, strict=True)
        ]
        nodes = self.positions(visit, axes)
        index = self.anatomy.index(nodes.flatten(0, 2))
        last = torch.tensor(self.anatomy.code.shape, dtype=index.dtype) - 1
        grid = (2 * index / last - 1).flip(-1).T.reshape(1, 3, *nodes.shape[:3])
        return evaluate(grid[0], [_between(*pair) for pair in zip(size, counts, strict=True)]).permute(1, 2, 3, 0)[None]

    def to_map(self, visit: int, points: Tensor) -> Tensor:
        """``X_v`` of frame points ``(N, 3)`` mm, in float64, without the interpolation between nodes."""
        places = points.double() / _DELTA + (_NODES - 1) / 2
        first = places.floor().long() - 1
        window = torch.arange(4)
        near = (first[:, :, None] + window).clamp(0, _NODES - 1)  # (N, 3, 4)
        weight = bump(places[:, :, None] - (first[:, :, None] + window))
        a, b, c = near.unbind(1)
        values = self.coefficients[visit].double()[:, a[:, :, None, None], b[:, None, :, None], c[:, None, None, :]]
        x, y, z = weight.unbind(1)
        moved = points.double() + torch.einsum("cnijk,ni,nj,nk->nc", values, x, y, z)
        return self.anatomy.pull(moved @ self.linear.T, self.amplitudes[visit])

    def correspond(self, points: Tensor, first: int, second: int, tolerance: float = 1e-6) -> Tensor:
        """Frame points of visit ``second`` that show what ``points (N, 3)`` mm show in visit ``first``, to 1e-6 mm.

        By a fixed-point iteration from the same place: between two visits, tissue moves by some mm only.
        """
        target, found, inverse = self.to_map(first, points), points.double(), torch.linalg.inv(self.linear)
        for _ in range(200):
            miss = (target - self.to_map(second, found)) @ inverse.T
            found = found + miss
            if miss.abs().max() < tolerance:
                break
        return found


def _between(length: int, nodes: int) -> Tensor:
    """``(length, nodes)`` weights of linear interpolation between nodes, the first and last at the ends."""
    place = torch.linspace(0, nodes - 1, length)
    return (1 - (place[:, None] - torch.arange(nodes)).abs()).clamp_min(0)


def draw_course(anatomy: Anatomy, stream: torch.Generator, change: float = 1.0) -> Course:
    """Draws shape, rates and times of a subject.

    Heads are 0.75 to 1.12 times as large as the map (from infants to large adults), mirrored in half of the cases, and
    bent by 3 mm (standard deviation of the coefficients, times a draw from 0.3 to 1.3). The visits are half a year to
    three years apart. One subject in three changes as in Alzheimer's disease, one in five grows: its rates have the
    opposite sign. Random shapes, which have no structures, are bent by about 1 mm more at the second visit.

    Args:
        anatomy: its map.
        stream: draws everything.
        change: factor on the change between the visits; 0 shows the same anatomy twice.
    """
    linear, size = _linear(stream)
    bend = 3.0 * uniform(stream, 0.3, 1.3) * torch.randn(3, _NODES, _NODES, _NODES, generator=stream)
    more = torch.zeros_like(bend)
    if not anatomy.labelled:
        more = change * torch.randn(bend.shape, generator=stream)
    limit = 0.9 * INJECTIVE * _DELTA
    coefficients = torch.stack([bend, bend + more]).clamp(-limit, limit)
    fast, grows = uniform(stream, 0, 1) < 1 / 3, uniform(stream, 0, 1) < 0.2
    severity = uniform(stream, 0, 1)
    rates = torch.tensor(
        [a + b * severity + c * uniform(stream, 0, 1) for a, b, c in (RATES[name][fast] for name in AGEING)],
        dtype=torch.float64,
    )
    longest = LONGEST_FAST if fast else LONGEST
    start = uniform(stream, -0.25, 0.25) * longest  # the map itself is at 0
    interval = uniform(stream, 0.5, 3.0)
    times = torch.tensor([start, start + change * interval], dtype=torch.float64)
    amplitudes = torch.zeros(2, 0, dtype=torch.float64)
    if anatomy.labelled:
        signed = -rates if grows else rates
        amplitudes = torch.linalg.solve(anatomy.response, signed[:, None] * times).T
    age = uniform(stream, 1, 12) * size if grows else uniform(stream, 20, 90)
    return Course(anatomy, linear, coefficients, amplitudes, (age, age + interval))


def _linear(stream: torch.Generator) -> tuple[Tensor, float]:
    """``(3, 3)`` frame → map frame, and the size of the head relative to the map."""
    angles = math.radians(8) * (2 * torch.rand(3, generator=stream, dtype=torch.float64) - 1)
    rotation = turn(angles)
    size = uniform(stream, 0.75, 1.12)
    scale = size * (1 + 0.08 * (2 * torch.rand(3, generator=stream, dtype=torch.float64) - 1))
    if uniform(stream, 0, 1) < 0.5:
        scale[0] = -scale[0]
    return rotation / scale, size
