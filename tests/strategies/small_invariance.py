"""AnatomicalInvariance on a tiny autoencoder."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.networks.backbone import Backbone
from lssl.strategies.anatomical_invariance import DINO, Alignment, AnatomicalInvariance, InfoNCE, Matching
from lssl.views.sampler import ViewSampler

NARROW = {"hidden": 16, "projection": 8, "block": 4, "norm": "layer"}
OBJECTIVES = {"dino": DINO, "info_nce": InfoNCE}
PARTS = {  # name of a part → what of make()'s options is its own
    "matching": ("matcher", "other_subject", "tries", "accept", "min_score"),
    "alignment": ("condition", "residual", "heads"),
    "objective": ("prototypes", "temperature", "teacher_temperature", "teacher_warmup", "centre_momentum", "exclusion"),
}


class Autoencoder(nn.Module):
    """Two strided convolutions, and two transposed ones back."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(1, 4, 2, stride=2)
        self.deep = nn.Conv3d(4, 6, 2, stride=2)
        self.up = nn.ConvTranspose3d(6, 5, 2, stride=2)
        self.last = nn.ConvTranspose3d(5, 3, 2, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(F.relu(self.up(F.relu(self.deep(F.relu(self.down(image)))))))


def make(objective: str = "dino", **options) -> AnatomicalInvariance:
    torch.manual_seed(0)
    backbone = Backbone(Autoencoder(), {"encoder": "deep", "decoder": "up"})
    views = ViewSampler(16, overlap=0.7, transforms=[])
    own = {part: {name: options.pop(name) for name in names if name in options} for part, names in PARTS.items()}
    kind = partial(OBJECTIVES[objective], **({"prototypes": 12} if objective == "dino" else {}), **own["objective"])
    parts = {"matching": Matching(**own["matching"]), "alignment": Alignment(**{"heads": 2, **own["alignment"]})}
    options = {**NARROW, **parts, "objective": kind, **options}
    strategy = AnatomicalInvariance(backbone, "encoder", "decoder", views=views, **options)
    with torch.no_grad():  # else the teacher would start equal to the network
        for parameter in strategy.teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return strategy


def draw(strategy: AnatomicalInvariance, batch):
    strategy.generator.manual_seed(0)
    return strategy.draw_views(batch)


def terms(strategy: AnatomicalInvariance, batch, swap: bool = False) -> dict[str, Tensor]:
    """Terms of fixed views and masks; swapped, both change places."""
    first, second = draw(strategy, batch)
    hidden = strategy.masking.draw(2 * len(batch), torch.Generator().manual_seed(1), "cpu")
    views = (second, first) if swap else (first, second)
    hidden = torch.cat(hidden.chunk(2)[::-1]) if swap else hidden
    strategy.masking.draw = lambda *_: hidden
    return strategy.terms(*views, batch)


@pytest.fixture(scope="module")
def batch(make_batch):
    return make_batch(3, (28, 26, 24), affine="same")


def objective(name: str) -> dict:
    return {"objective": name}


BOTH = pytest.mark.parametrize("name", ["dino", "info_nce"])
