"""Smooth free-form deformations: cubic B-splines on a lattice, evaluated on a grid by three small matrix products.

    d(x) = Σ_abc  c_abc  β(x/δ − a) β(y/δ − b) β(z/δ − c)

``x + d(x)`` is one-to-one wherever ``|c| < 0.403 δ`` along each axis (Choi & Lee, "Injectivity conditions of 2D and 3D
uniform cubic B-spline functions", Graphical Models 2000: 1/K₃ with K₃ ≈ 2.4795).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["INJECTIVE", "basis", "bump", "evaluate"]

INJECTIVE = 0.403
"""Largest coefficient, in distances between nodes, with which the deformation is surely one-to-one."""


def bump(offset: Tensor) -> Tensor:
    """β, the cubic B-spline, at ``offset`` nodes from its own; 0 from 2 nodes on."""
    distance = offset.abs()
    near = 2 / 3 - distance.square() + distance.pow(3) / 2
    return torch.where(distance < 1, near, (2 - distance).clamp_min(0).pow(3) / 6)


def basis(places: Tensor, nodes: int) -> Tensor:
    """``(n, nodes)`` weights β of each node at ``places (n,)``, which count in nodes from the first one.

    From place 1 to place ``nodes - 2`` they add up to 1.
    """
    return bump(places[:, None] - torch.arange(nodes, dtype=places.dtype))


def evaluate(coefficients: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """``(C, D, H, W)`` values on the grid of three ``(n, nodes)`` bases, of coefficients ``(C, a, b, c)``."""
    first, second, third = bases
    return torch.einsum("cabz,da,hb->cdhz", coefficients @ third.T, first, second)
