"""LongitudinalLocal on a narrow network and random volumes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from lssl.data.batch import PairBatch
from lssl.networks.backbone import Backbone, unet, unet_taps
from lssl.strategies import longitudinal_local
from lssl.strategies.longitudinal_local import Cosine, InfoNCE, LongitudinalLocal
from lssl.views.sampler import View, ViewSampler

TERMS = list(LongitudinalLocal.LOSS_WEIGHTS)
OBJECTIVES = {"cosine": partial(Cosine, predictor_hidden=8), "info_nce": InfoNCE}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone(unet(features=(4, 4, 8, 8, 8, 6)), unet_taps())


@pytest.fixture
def make(backbone):
    def build(views: dict | None = None, objective: str = "cosine", **settings) -> LongitudinalLocal:
        sampler = ViewSampler(32, **{"geometry": "shared", "transforms": [], **(views or {})})
        narrow = {"hidden": 16, "projection": 12, "objective": OBJECTIVES[objective], "samples": 16}
        return LongitudinalLocal(copy.deepcopy(backbone), views=sampler, **{**narrow, **settings})

    return build


@pytest.fixture
def batch(make_batch) -> PairBatch:
    return make_batch(2, (36, 34, 32), affine="same")


def views(strategy: LongitudinalLocal, batch: PairBatch) -> tuple[View, View]:
    strategy.generator.manual_seed(0)
    return strategy.views(batch, strategy.generator)


def terms(strategy: LongitudinalLocal, batch: PairBatch, swap: bool = False) -> dict[str, Tensor]:
    first, second = views(strategy, batch)
    strategy.generator.manual_seed(1)
    return strategy.terms(*((second, first) if swap else (first, second)), batch)


def only(*names: str) -> dict[str, float]:
    return {name: float(name in names) for name in TERMS}


@pytest.fixture
def drawn(monkeypatch) -> Iterator[dict]:
    """Tap → places that were drawn for it."""
    places, original = {}, longitudinal_local.plan_points

    def record(first, second, taps, *rest):
        found = original(first, second, taps, *rest)
        places.update({tap.module: torch.from_numpy(mm) for tap, mm in zip(taps, found.mm, strict=True)})
        return found

    monkeypatch.setattr(longitudinal_local, "plan_points", record)
    return places
