"""Random draws and rotations that all synthetic heads share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["RESIDUAL", "misregistration", "turn", "uniform"]

RESIDUAL = 0.5
"""Degrees, and voxels, by which two visits of one subject are misregistered at most."""


def uniform(stream: torch.Generator, low: float, high: float) -> float:
    """One uniform draw."""
    return low + (high - low) * torch.rand((), generator=stream, dtype=torch.float64).item()


def turn(vector: Tensor) -> Tensor:
    """``(3, 3)`` float64 rotation about ``vector (3,)``, whose length is the angle in radians."""
    x, y, z = vector.tolist()
    return torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64))


def misregistration(centre: Tensor, spacing: float, stream: torch.Generator) -> Tensor:
    """``(4, 4)`` float64 in mm: at most half a degree about ``centre (3,)``, then a shift of at most half a voxel."""
    axis, shift = torch.randn(2, 3, generator=stream, dtype=torch.float64)
    rotation = turn(axis / axis.norm() * math.radians(uniform(stream, 0, RESIDUAL)))
    shift = shift / shift.norm() * spacing * uniform(stream, 0, RESIDUAL)
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3], matrix[:3, 3] = rotation, centre - rotation @ centre + shift
    return matrix
