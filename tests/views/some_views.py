"""Draws views, and reads off their matrices."""

from __future__ import annotations

import torch

from lssl.data.batch import PairBatch
from lssl.views.sampler import View, ViewSampler

SIZE = (12, 10, 8)
BIG = (40, 36, 32)


def views(seed: int = 0, size=SIZE, **settings) -> tuple[ViewSampler, torch.Generator]:
    settings = {"transforms": [], "affine_probability": 1.0, **settings}
    return ViewSampler(size, **settings), torch.Generator().manual_seed(seed)


def draw(batch: PairBatch, seed: int = 0, **settings) -> tuple[View, View]:
    sampler, generator = views(seed, **settings)
    return sampler(batch, generator)


def index_map(view: View) -> torch.Tensor:
    """View index → source index."""
    return torch.linalg.inv(view.source_affine) @ view.affine
