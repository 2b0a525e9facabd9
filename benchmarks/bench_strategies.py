"""What a training step of each strategy costs beside the bare network, in one run.

python benchmarks/bench_strategies.py [side of the views] [pairs]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from lssl import Backbone, PairBatch, Strategy, ViewSampler
from lssl.strategies.anatomical_invariance import AnatomicalInvariance
from lssl.strategies.global_contrastive import BYOL, GlobalContrastive, MoCo, SimCLR, VICReg
from lssl.strategies.longitudinal_local import LongitudinalLocal
from lssl.strategies.prior_guided_local import InfoNCE, PriorGuidedLocal
from lssl.strategies.prior_guided_local import VICReg as LocalVICReg

SIDE, PAIRS = (int(argument) for argument in (*sys.argv[1:], *("64", "2")[len(sys.argv) - 1 :])[:2])
REPEATS = 3


def batch() -> PairBatch:
    size = (SIDE + 8,) * 3
    return PairBatch(
        images=torch.rand(PAIRS, 2, 1, *size),
        affines=torch.eye(4, dtype=torch.float64).repeat(PAIRS, 2, 1, 1),
        extent=torch.tensor(size).repeat(PAIRS, 2, 1),
        foreground=torch.ones(PAIRS, 2, *size, dtype=torch.bool),
        ages=torch.full((PAIRS, 2), 40.0),
        times=torch.zeros(PAIRS, 2),
        labels=None,
        subject=torch.arange(PAIRS),
        session=torch.arange(2 * PAIRS).view(PAIRS, 2),
    )


def strategies() -> dict[str, Callable[[], torch.Tensor]]:
    """Name → one forward and backward pass, views excluded."""
    pairs, views = batch(), ViewSampler(SIDE, transforms=[])
    first, second = views(pairs, torch.Generator().manual_seed(0))
    images = torch.cat([first.image, second.image])
    small = {"hidden": 512, "projection": 128}
    built: dict[str, Strategy] = {
        "LongitudinalLocal, published heads": LongitudinalLocal(Backbone(), views=views),
        "PriorGuidedLocal, cosine": PriorGuidedLocal(Backbone(), views=views, **small),
        "PriorGuidedLocal, info_nce": PriorGuidedLocal(Backbone(), objective=InfoNCE, views=views, **small),
        "PriorGuidedLocal, vicreg": PriorGuidedLocal(Backbone(), objective=LocalVICReg, views=views, **small),
        "AnatomicalInvariance": AnatomicalInvariance(Backbone(), views=views),
    }
    for objective in (SimCLR, MoCo, BYOL, VICReg):
        name = f"GlobalContrastive, {objective.__name__}"
        built[name] = GlobalContrastive(Backbone(), objective=objective, views=views)

    def whole(network: Backbone = Backbone(), tap: str | None = None) -> torch.Tensor:  # noqa: B008
        return network(images, [tap] if tap else [], output=not tap)[tap or "output"].square().mean()

    def step(strategy: Strategy) -> torch.Tensor:
        strategy.train()
        return torch.stack(list(strategy.terms(first, second, pairs).values())).sum()

    passes = {"network, encoder and decoder": whole, "network, encoder": lambda: whole(tap="bottleneck")}
    return passes | {name: (lambda strategy=strategy: step(strategy)) for name, strategy in built.items()}


def main() -> None:
    """Interleaves the candidates; prints medians and ratios to the bare network."""
    candidates = strategies()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(REPEATS):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate().backward()
            times[name].append(time.perf_counter() - start)
    median = {name: sorted(values)[REPEATS // 2] for name, values in times.items()}
    bare = median["network, encoder and decoder"]
    print(f"{PAIRS} pairs of {SIDE}³ views, {torch.get_num_threads()} thread(s), median of {REPEATS}")
    for name, value in median.items():
        print(f"{name:<40}{1000 * value:8.0f} ms{value / bare:8.2f} of the bare network")


if __name__ == "__main__":
    main()
