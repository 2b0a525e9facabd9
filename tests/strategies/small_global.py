"""GlobalContrastive on a tiny network, and its embeddings in float64."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from helpers import unlike
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.networks.backbone import Backbone
from lssl.strategies.global_contrastive import BYOL, GlobalContrastive, MoCo, SimCLR, VICReg
from lssl.views.sampler import View, ViewSampler

PAIRS, WIDTH = 5, 7
SUBJECTS = [3, 5, 3, 8, 9]  # the first and the third pair are of one subject
SMALL = {
    "simclr": partial(SimCLR, hidden=12, projection=WIDTH),
    "moco": partial(MoCo, norm="layer", hidden=12, projection=WIDTH, queue=16),
    "byol": partial(BYOL, hidden=12, projection=WIDTH),
    "vicreg": partial(VICReg, hidden=12, projection=WIDTH),
}
NAMES = list(SMALL)


def make(name: str = "moco", views: dict | None = None, **settings) -> GlobalContrastive:
    """The teacher, where there is one, differs from the online network, so that one cannot stand for the other."""
    torch.manual_seed(0)
    encoder = [nn.Conv3d(1, 5, 2, 2), nn.LeakyReLU(), nn.Conv3d(5, 6, 2, 2)]
    network = nn.Sequential(*encoder, nn.InstanceNorm3d(6), nn.ConvTranspose3d(6, 2, 4, 4))
    backbone = Backbone(network, {"fine": "0", "bottleneck": "2", "normed": "3"})
    sampler = ViewSampler((12, 12, 8), **{"transforms": None, **(views or {})})
    strategy = GlobalContrastive(backbone, objective=SMALL[name], views=sampler, **settings)
    return unlike(strategy)


@pytest.fixture
def batch(make_batch) -> PairBatch:
    batch = make_batch(PAIRS, (16, 15, 12))
    batch.images *= torch.linspace(0.5, 2, PAIRS).view(-1, 1, 1, 1, 1, 1)
    batch.subject = torch.tensor(SUBJECTS)
    batch.times = torch.tensor([[0.0, 1.0], [0, 2.5], [4, 0], [0, 0], [1, float("nan")]])
    batch.ages = torch.full((PAIRS, 2), float("nan"))  # intervals come from times: ages may be unknown
    return batch


def draw(strategy: GlobalContrastive, batch: PairBatch) -> tuple[View, View]:
    strategy.generator.manual_seed(0)
    return strategy.views(batch, strategy.generator)


def terms(strategy: GlobalContrastive, batch: PairBatch, swap: bool = False) -> dict[str, Tensor]:
    first, second = draw(strategy, batch)
    return strategy.terms(*((second, first) if swap else (first, second)), batch)


def fill(strategy: GlobalContrastive) -> None:
    """Keys of other subjects, of the batch's own, and empty places."""
    queue = strategy.objective.queue
    queue.keys.copy_(nn.functional.normalize(torch.randn(16, WIDTH), dim=1))
    queue.subject_ids.copy_(torch.tensor([0, 1, 3, 3, 5, 8, 20, 21, 22, 9, 3, 23, -1, -1, -1, -1]))
    queue.pointer.fill_(12)


def embedded(strategy: GlobalContrastive, view: View, subject_ids: str) -> np.ndarray:
    """``(B, D)`` in float64: pooled by hand, through the online or the teacher's network and projector."""
    teacher = subject_ids == "teacher"
    backbone, projector = (
        (strategy.teacher["backbone"], strategy.teacher["projector"])
        if teacher
        else (strategy.backbone, strategy.objective.projector)
    )
    network, projector = (copy.deepcopy(module).double() for module in (backbone.network, projector))
    with torch.no_grad():
        maps = nn.Sequential(*network[:3])(view.image.double()).numpy()
        pooled = np.array([[c.mean() for c in m] + [c.max() for c in m] for m in maps])
        return projector(torch.from_numpy(pooled)).numpy()


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.sqrt((rows**2).sum(-1, keepdims=True))
