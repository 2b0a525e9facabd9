"""Two hundred steps on the phantom leave every objective's representation alive, and a made collapse is seen."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from lssl import Backbone, Strategy, ViewSampler
from lssl.data.batch import collate
from lssl.datamodules.phantom import PhantomDataModule
from lssl.metrics import EffectiveRank
from lssl.strategies import prior_guided_local
from lssl.strategies.anatomical_embedding import AnatomicalEmbedding, CoarseMap, FineMap
from lssl.strategies.anatomical_invariance import DINO, AnatomicalInvariance, InfoNCE, Matching
from lssl.strategies.global_contrastive import BYOL, GlobalContrastive, MoCo, SimCLR, VICReg
from lssl.strategies.masked_autoencoder import MaskedAutoencoder
from lssl.strategies.prior_guided_local import PriorGuidedLocal
from lssl.views.intensity import Contrast, Noise

STEPS, PAIRS = 200, 8


@pytest.fixture(scope="module")
def pairs():
    """Sixteen subjects of two visits each, drawn once."""
    data = PhantomDataModule(subjects=16, visits=2, size=28, spacing=6.5, split=(1.0, 0.0, 0.0))
    data.setup("fit")
    return [data._dataset(data.train_pairs, None)[number] for number in range(16)]


def backbone() -> Backbone:
    """Strided convolutions; the deep tap is a raw convolution, as the default U-Net's are."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv3d(before, after, 3, stride=2, padding=1), nn.BatchNorm3d(after), nn.ReLU()]
    return Backbone(nn.Sequential(*layers), {"mid": "3", "deep": "6"})


def views() -> ViewSampler:
    return ViewSampler(24, same_visit=0.5, flip_together=False, transforms=[Contrast(), Noise()])


def train(strategy: Strategy, pairs: list) -> Strategy:
    """AdamW with a cosine, and the teacher, as the trainer would."""
    strategy.train()
    optimizer = torch.optim.AdamW([p for p in strategy.parameters() if p.requires_grad], lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        strategy.generator.manual_seed(step)
        chosen = torch.randperm(len(pairs), generator=strategy.generator)[:PAIRS].tolist()
        batch = collate([pairs[number] for number in chosen])
        terms = strategy.terms(*strategy.draw_views(batch), batch)
        optimizer.zero_grad()
        sum(strategy.loss_weights.get(name, 1.0) * value for name, value in terms.items()).backward()
        optimizer.step()
        schedule.step()
        strategy.on_step_end((step + 1) / STEPS)
    return strategy


@torch.no_grad()
def health(strategy: Strategy, pairs: list, tap: str) -> tuple[float, float]:
    """Of fresh views in evaluation mode: effective rank of the tap's voxels, and spread of the projections."""
    strategy.eval().generator.manual_seed(-1)
    batch = collate(pairs)
    first, second = strategy.draw_views(batch)
    strategy.terms(first, second, batch)
    features = strategy.backbone(torch.cat([first.image, second.image]), [tap])[tap]
    rank = EffectiveRank(features.shape[1])
    rank.update(features.flatten(2).transpose(1, 2).flatten(0, 1))
    return float(rank.compute()), float(strategy.logged.get("feature_std", strategy.logged.get("explained")))


def globally(objective, loss_weights=None, **options) -> GlobalContrastive:
    return GlobalContrastive(
        backbone(), ("deep",), lambda n: objective(n, 256, 64, **options), loss_weights=loss_weights, views=views()
    )


LOCAL = {
    "cosine": prior_guided_local.Cosine,
    "info_nce": prior_guided_local.InfoNCE,
    "vicreg": prior_guided_local.VICReg,
}


def locally(objective, **options) -> PriorGuidedLocal:
    return PriorGuidedLocal(
        backbone(), ("mid",), objective=LOCAL[objective], hidden=128, projection=64, views=views(), **options
    )


def anatomically(**options) -> AnatomicalEmbedding:
    sampler = ViewSampler(24, same_visit=0.5, transforms=[Contrast(), Noise()])  # mirrored together: left is not right
    fine = FineMap("mid", anchors=16, hard=64, diverse=32)
    coarse = CoarseMap("deep", anchors=16, cross_subject_negatives=64)
    return AnatomicalEmbedding(backbone(), fine, coarse, views=sampler, **{"temperature": 0.1, **options})


def invariantly(objective: str) -> AnatomicalInvariance:
    sampler = ViewSampler(24, overlap=0.6, transforms=[Contrast(), Noise()])
    small = {"hidden": 128, "projection": 64, "block": 8, "matching": Matching(other_subject=0.5)}
    kinds = {"dino": partial(DINO, prototypes=128), "info_nce": InfoNCE}
    only = {"reconstruction": 0.0}
    return AnatomicalInvariance(
        backbone(), "deep", "mid", objective=kinds[objective], loss_weights=only, views=sampler, **small
    )


def masked() -> MaskedAutoencoder:
    """It has no embedding; how much it explains of what is hidden stands for the spread."""
    up = [nn.ConvTranspose3d(32, 4, 8, stride=8)]
    network = nn.Sequential(*backbone().network, *up)
    return MaskedAutoencoder(Backbone(network, {"mid": "3", "deep": "6"}), 0.5, 6, views=views())


OBJECTIVES = {
    "SimCLR": lambda: globally(SimCLR),
    "MoCo": lambda: globally(MoCo, queue=128),
    "BYOL": lambda: globally(BYOL),
    "VICReg": lambda: globally(VICReg),
    "cosine": lambda: locally("cosine"),
    "info_nce": lambda: locally("info_nce"),
    "vicreg": lambda: locally("vicreg"),
    "anatomical": anatomically,
    "Alice, DINO": lambda: invariantly("dino"),
    "Alice, InfoNCE": lambda: invariantly("info_nce"),
    "masked": masked,
}
COLLAPSING = {
    "VICReg": lambda: globally(VICReg, {"variance": 0.0, "covariance": 0.0}, norm="layer"),
    "vicreg": lambda: locally("vicreg", loss_weights={"variance": 0.0, "covariance": 0.0}, norm="layer"),
}


FAST = ("cosine",)  # in every run of the suite; the others take as long


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES]
)
def test_every_objective_stays_alive(name, pairs):
    strategy = OBJECTIVES[name]()
    tap = "mid" if name.islower() or "_" in name else "deep"
    rank_before, _ = health(strategy, pairs, tap)
    rank, apart = health(train(strategy, pairs), pairs, tap)
    assert rank > rank_before / 3
    assert apart > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["VICReg", "vicreg"])
def test_a_collapse_would_be_seen(name, pairs):
    strategy = COLLAPSING[name]()
    _, apart = health(train(strategy, pairs), pairs, "mid" if name.islower() else "deep")
    assert apart < 0.05
