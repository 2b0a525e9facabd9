"""Volumes of the voxels of a mask whose corners have moved."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["Cells"]


class Cells:
    """The voxels of a mask as cells between shared corners, eight to a voxel.

    A moved cell is the six tetrahedra of Kuhn's triangulation, which fit to those of the neighbours: the volumes of a
    region add up to what the moved surface encloses, without gaps or overlaps. Within an eighth of a voxel, what is
    interpolated between the voxels' centres has no kink.

    Args:
        mask: ``(D, H, W)`` bool.
        affine: ``(4, 4)`` float64, index → mm.

    Attributes:
        corners: ``(N, 3)`` mm, float64; each once.
    """

    def __init__(self, mask: Tensor, affine: Tensor) -> None:
        depth, height, width = (2 * length + 1 for length in mask.shape)
        steps = torch.tensor(list(itertools.product((0, 1), repeat=3)))
        place = (2 * mask.nonzero())[:, None, None] + steps[:, None] + steps  # (n, 8 parts, 8 corners, 3)
        flat = (place[..., 0] * height + place[..., 1]) * width + place[..., 2]
        used = torch.zeros(depth * height * width, dtype=torch.bool)
        used[flat.flatten()] = True
        self._cells = (used.cumsum(0) - 1)[flat]  # (n, 8, 8) rows of `corners`
        lattice = used.view(depth, height, width).nonzero().double() / 2 - 0.5
        self.corners = lattice @ affine[:3, :3].T + affine[:3, 3]
        self._handedness = torch.linalg.det(affine[:3, :3]).sign()

    def volumes(self, corners: Tensor) -> Tensor:
        """``(n,)`` mm³ of each voxel when the corners lie at ``corners (N, 3)``, in the order of ``mask.nonzero()``."""
        total = torch.zeros(self._cells.shape[:2], dtype=torch.float64)
        for axes in itertools.permutations(range(3)):  # from the first corner to the last, along one axis after another
            steps = [(4, 2, 1)[axis] for axis in axes]
            rows = [0, steps[0], steps[0] + steps[1], 7]
            a, b, c, d = (corners[self._cells[..., row]] for row in rows)
            parity = torch.linalg.det(torch.eye(3, dtype=torch.float64)[list(axes)])
            total += parity * ((b - a) * torch.linalg.cross(c - b, d - c)).sum(-1) / 6
        return self._handedness * total.sum(1)
