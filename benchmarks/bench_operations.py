"""Operations of a training step of each strategy, which a GPU would be asked to launch.

python benchmarks/bench_operations.py [side of the views] [pairs] [--list]

``--list`` prints the commonest operations too. The network's own forward operations are not counted; "backward" holds
the network's too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lssl import Backbone, PairBatch, Strategy, ViewSampler
from lssl.networks.backbone import unet
from lssl.strategies.anatomical_embedding import AnatomicalEmbedding
from lssl.strategies.anatomical_invariance import AnatomicalInvariance
from lssl.strategies.global_contrastive import BYOL, GlobalContrastive, MoCo, SimCLR, VICReg
from lssl.strategies.label_contrast import LabelContrast
from lssl.strategies.latent_direction import LatentDirection
from lssl.strategies.longitudinal_local import InfoNCE, LongitudinalLocal
from lssl.strategies.masked_autoencoder import MaskedAutoencoder
from lssl.strategies.neighbourhood_embedding import NeighbourhoodEmbedding
from lssl.strategies.prior_guided_local import InfoNCE as LocalInfoNCE
from lssl.strategies.prior_guided_local import PriorGuidedLocal
from lssl.strategies.prior_guided_local import VICReg as LocalVICReg
from lssl.strategies.siamese_masked_autoencoder import SiameseMaskedAutoencoder
from lssl.strategies.temporal_order import TemporalOrder
from lssl.strategies.trajectory_order import TrajectoryOrder
from lssl.strategies.trajectory_prediction import TrajectoryPrediction
from lssl.utils.operations import CountOperations
from lssl.views import alignment
from lssl.views.intensity import IntensityTransform, default_transforms

SMALL = {"hidden": 16, "projection": 8}
THREE_TAPS = ("bottleneck", "decoder.3", "decoder.2")
ONLY_SIMILARITY = {"variance": 0.0, "covariance": 0.0, "orthogonality": 0.0}

#: Name → the strategy with narrow heads: widths change no count.
STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "LongitudinalLocal, published": partial(LongitudinalLocal, **SMALL),
    "LongitudinalLocal, info_nce": partial(LongitudinalLocal, objective=InfoNCE, **SMALL),
    "LongitudinalLocal, recommended": partial(
        LongitudinalLocal,
        objective=InfoNCE,
        foreground=True,
        encoder_taps=(),
        decoder_taps=("decoder.2", "decoder.1", "decoder.0"),
        samples=256,
        projector_layers=2,
        loss_weights=ONLY_SIMILARITY,
        **SMALL,
    ),
    "PriorGuidedLocal, cosine": partial(PriorGuidedLocal, **SMALL),
    "PriorGuidedLocal, info_nce": partial(PriorGuidedLocal, objective=LocalInfoNCE, **SMALL),
    "PriorGuidedLocal, vicreg": partial(PriorGuidedLocal, objective=LocalVICReg, **SMALL),
    "PriorGuidedLocal, cosine, 3 taps": partial(PriorGuidedLocal, taps=THREE_TAPS, **SMALL),
    "GlobalContrastive, SimCLR": partial(GlobalContrastive, objective=SimCLR),
    "GlobalContrastive, MoCo": partial(GlobalContrastive, objective=MoCo),
    "GlobalContrastive, BYOL": partial(GlobalContrastive, objective=BYOL),
    "GlobalContrastive, VICReg": partial(GlobalContrastive, objective=VICReg),
    "AnatomicalInvariance": partial(AnatomicalInvariance, **SMALL),
    "AnatomicalEmbedding": partial(AnatomicalEmbedding, hidden=16, embedding=8),
    "LabelContrast": partial(LabelContrast, **SMALL),
    "MaskedAutoencoder": MaskedAutoencoder,
    "TemporalOrder": TemporalOrder,
    "TrajectoryOrder": partial(TrajectoryOrder, norm="layer"),
    "LatentDirection": LatentDirection,
    "NeighbourhoodEmbedding": NeighbourhoodEmbedding,
    "SiameseMaskedAutoencoder": SiameseMaskedAutoencoder,
    "TrajectoryPrediction": partial(TrajectoryPrediction, norm="layer"),
}


def batch(pairs: int, size: int) -> PairBatch:
    shape = (size,) * 3
    affines = torch.eye(4, dtype=torch.float64).repeat(pairs, 2, 1, 1)
    foreground = torch.zeros(pairs, 2, *shape, dtype=torch.bool)
    foreground[..., size // 8 : -(size // 8)] = True
    return PairBatch(
        images=torch.rand(pairs, 2, 1, *shape),
        affines=affines,
        extent=torch.tensor(shape).repeat(pairs, 2, 1),
        foreground=foreground,
        ages=torch.full((pairs, 2), 40.0),
        times=torch.tensor([[0.0, 2.0]]).repeat(pairs, 1),
        labels=torch.randint(0, 5, (pairs, 2, *shape), dtype=torch.int16),
        subject=torch.arange(pairs),
        session=torch.arange(2 * pairs).view(pairs, 2),
    )


def always() -> list[IntensityTransform]:
    """Every intensity change, at every step."""
    changes = default_transforms()
    for change in changes:
        change.p = 1.0
    return changes


def built(name: str, side: int) -> Strategy:
    """One of :data:`STRATEGIES` with a narrow network, every intensity change on."""
    views = ViewSampler(side, transforms=always(), affine_probability=1.0)
    return STRATEGIES[name](Backbone(unet(features=(4, 4, 8, 8, 8, 6))), views=views).train()


def operations(strategy: Strategy, pairs: PairBatch) -> dict[str, CountOperations]:
    """Counts of the views, of the terms without the network's forward passes, and of the backward pass."""
    parts = {name: CountOperations() for name in ("views", "terms", "backward")}
    strategy.seed("fit", 0)
    networks = [module for module in strategy.modules() if isinstance(module, Backbone)]
    with parts["views"].without(*networks), parts["views"]:
        first, second = strategy.draw_views(pairs)
    with parts["terms"].without(*networks), parts["terms"]:
        loss = strategy.total(strategy.terms(first, second, pairs))
    with parts["backward"]:
        loss.backward()
    return parts


def planning(strategy: Strategy, pairs: PairBatch, rounds: int = 5) -> float:
    """Milliseconds of a step in which the host plans: views up to their copy to the device, and points."""
    watches = [Stopwatch(ViewSampler, "_make")]
    module = sys.modules[type(strategy).__module__]
    names = ("plan_points", "sampling_grids", "draw_distinct", "lattice_parts")
    watches += [Stopwatch(module, name) for name in names if hasattr(module, name)]
    watches.append(Stopwatch(alignment, "plan_alignment"))
    spent = []
    for number in range(rounds):
        for watch in watches:
            watch.seconds = 0.0
        strategy.seed("fit", number)
        start = time.thread_time()
        first, second = strategy.draw_views(pairs)
        views = time.thread_time() - start - watches[0].seconds
        with torch.no_grad():
            strategy.terms(first, second, pairs)
        spent.append(1000 * (views + sum(watch.seconds for watch in watches[1:])))
    for watch in watches:
        watch.stop()
    return sorted(spent)[rounds // 2]


class Stopwatch:
    """Sums the time in a function or method, while it lasts."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name, self.original, self.seconds = owner, name, getattr(owner, name), 0.0
        setattr(owner, name, self.timed)

    @property
    def timed(self) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return self.original(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - start

        return run

    def stop(self) -> None:
        setattr(self.owner, self.name, self.original)


def main(side: int = 64, count: int = 2) -> None:
    """Prints a row for each strategy."""
    pairs = batch(count, side + 16)
    print(f"operations of a step, {count} pairs of {side}³ views")
    print(f"{'':<36}{'views':>8}{'terms':>8}{'backward':>10}{'plan, ms':>10}")
    for name in STRATEGIES:
        strategy = built(name, side)
        parts = operations(strategy, pairs)
        print(f"{name:<36}{parts['views'].total:>8}{parts['terms'].total:>8}{parts['backward'].total:>10}", end="")
        print(f"{planning(strategy, pairs):>10.2f}")
        if "--list" in sys.argv:
            print({part: dict(counted.found.most_common(12)) for part, counted in parts.items()})


if __name__ == "__main__":
    main(*[int(argument) for argument in sys.argv[1:] if argument.isdigit()])
