"""PriorGuidedLocal on a tiny network, whose teacher differs from the online network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import unlike
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.networks.backbone import Backbone
from lssl.strategies.prior_guided_local import Cosine, InfoNCE, PriorGuidedLocal, VICReg
from lssl.views.sampler import View, ViewSampler

OBJECTIVES = {"cosine": Cosine, "info_nce": InfoNCE, "vicreg": VICReg}
SIZE = (32, 28, 24)
SOURCE = (36, 34, 32)
TAPS = {"fine": (2, 0.0), "bottleneck": (4, 1.0)}  # stride and offset: a padded 3×3×3 kernel, then a 2×2×2 one


def network() -> nn.Module:
    encoder = [nn.Conv3d(1, 5, 3, 2, 1), nn.LeakyReLU(), nn.Conv3d(5, 6, 2, 2)]
    return nn.Sequential(*encoder, nn.InstanceNorm3d(6), nn.ConvTranspose3d(6, 2, 4, 4))


def sampler(**settings) -> ViewSampler:
    settings = {"transforms": [], "affine_probability": 1.0, "zoom": (0.8, 1.3), "rotation": 15.0, **settings}
    return ViewSampler(SIZE, **{"flip": (0.5, 0.5, 0.5), "flip_together": False, "overlap": 0.4, **settings})


def make(views: ViewSampler | None = None, objective: str = "cosine", **settings) -> PriorGuidedLocal:
    """Its teacher differs from the online network, so that one cannot stand for the other."""
    torch.manual_seed(0)
    backbone = Backbone(network(), {"fine": "0", "bottleneck": "2"})
    narrow = {"hidden": 12, "projection": 7, "norm": "layer", "min_points": 1, "samples": 16}
    own = {name: settings.pop(name) for name in ("temperature", "exclusion") if name in settings}
    settings = {**narrow, **settings, "objective": partial(OBJECTIVES[objective], **own)}
    strategy = PriorGuidedLocal(backbone, views=views or sampler(), **settings)
    return unlike(strategy)


@pytest.fixture
def batch(make_batch) -> PairBatch:
    """Two pairs whose foreground is a box and whose sources end before their arrays do."""
    batch = make_batch(2, SOURCE)
    batch.foreground[:, :, :, :6] = False
    batch.foreground[1, 1, 28:] = False
    batch.extent[1, 0] = torch.tensor((34, 30, 32))
    return batch


def draw(strategy: PriorGuidedLocal, batch: PairBatch) -> tuple[View, View]:
    strategy.generator.manual_seed(0)
    return strategy.views(batch, strategy.generator)


def terms(strategy: PriorGuidedLocal, batch: PairBatch, views: tuple[View, View] | None = None) -> dict[str, Tensor]:
    first, second = views or draw(strategy, batch)
    strategy.generator.manual_seed(1)
    return strategy.terms(first, second, batch)


@pytest.fixture
def seen() -> Callable[[nn.Module], list]:
    """Arguments of every call of a module."""

    def watch(module: nn.Module) -> list:
        calls: list = []
        module.register_forward_pre_hook(lambda _, args: calls.append(args))
        return calls

    return watch


def apart(views: tuple[View, View], rows: list[int], how: str) -> tuple[View, View]:
    """Leaves the named samples without anything to compare; images are leaves that ask for a gradient."""
    first, second = (replace(view, image=view.image.clone().requires_grad_()) for view in views)
    if how == "far away":
        for affine in (second.affine, second.source_affine):
            affine[rows, :3, 3] += 500.0
    else:
        second.source_foreground[rows] = False
    return first, second


EVERYTHING = {"similarity": 1.0, "variance": 1.0, "covariance": 1.0}
