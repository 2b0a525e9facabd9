"""Prints what one pair of views costs, beside the same work in MONAI and beside two plain warps.

Run: ``python benchmarks/bench_views.py [size] [threads]``. Variants take turns in one run: compare ratios only.
"""

from __future__ import annotations

import sys
import time

import torch
import torch.nn.functional as F
from monai import transforms as mt

from lssl.data.batch import PairBatch
from lssl.views.intensity import BiasField, Blur, Gamma, Noise
from lssl.views.sampler import ViewSampler

SOURCE, PAIRS, ROUNDS = (160, 192, 160), 2, 6


def batch() -> PairBatch:
    return PairBatch(
        images=torch.rand(PAIRS, 2, 1, *SOURCE),
        affines=torch.eye(4, dtype=torch.float64).repeat(PAIRS, 2, 1, 1),
        extent=torch.tensor(SOURCE).repeat(PAIRS, 2, 1),
        foreground=torch.ones(PAIRS, 2, *SOURCE, dtype=torch.bool),
        ages=torch.zeros(PAIRS, 2),
        times=torch.zeros(PAIRS, 2),
        labels=None,
        subject=torch.arange(PAIRS),
        session=torch.zeros(PAIRS, 2, dtype=torch.long),
    )


def monai_pipeline(size: int, p: float | None) -> mt.Compose:
    """Crop, affine and the four intensity changes of the published code, always on or with its probabilities."""
    chance = dict.fromkeys(("affine", "blur", "noise", "bias", "gamma"), p)
    if p is None:
        chance = {"affine": 0.5, "blur": 0.3, "noise": 0.25, "bias": 0.2, "gamma": 0.3}
    return mt.Compose(
        [
            mt.RandSpatialCrop([size] * 3, random_size=False),
            mt.RandAffine(prob=chance["affine"], rotate_range=[0.17] * 3, scale_range=[0.2] * 3, padding_mode="zeros"),
            mt.RandGaussianSmooth((0, 2), (0, 2), (0, 2), prob=chance["blur"]),
            mt.RandGaussianNoise(prob=chance["noise"], std=0.25),
            mt.RandBiasField(prob=chance["bias"]),
            mt.RandAdjustContrast(prob=chance["gamma"], gamma=(0.74, 1.35)),
        ]
    )


def main(size: int = 96, threads: int = 1) -> None:
    """Times each variant ``ROUNDS`` times in turn and prints medians in ms per pair."""
    torch.set_num_threads(threads)
    pairs, generator = batch(), torch.Generator().manual_seed(0)
    always = [Blur(1.0), Noise(1.0), BiasField(1.0), Gamma(1.0)]
    published = [Blur(), Noise(), BiasField(), Gamma()]
    common = {"size": (size,) * 3, "foreground": False}
    shared = {**common, "geometry": "shared", "intensity": "shared"}
    samplers = {
        "lssl shared, published p": ViewSampler(**shared, transforms=published),
        "lssl shared, all p=1": ViewSampler(**shared, transforms=always, affine_probability=1.0),
        "lssl independent, published p": ViewSampler(**common, transforms=published),
        "lssl independent, all p=1": ViewSampler(**common, transforms=always, affine_probability=1.0),
        "lssl shared, warp alone": ViewSampler(**shared, transforms=[], affine_probability=1.0),
    }
    variants = {name: lambda sampler=sampler: sampler(pairs, generator) for name, sampler in samplers.items()}
    for name, p in (("MONAI, published p", None), ("MONAI, all p=1", 1.0)):
        pipeline = monai_pipeline(size, p)
        variants[name] = lambda pipeline=pipeline: [pipeline(image) for image in pairs.images.flatten(0, 1)]
    theta = torch.eye(3, 4).repeat(2 * PAIRS, 1, 1)

    def warps() -> torch.Tensor:
        grid = F.affine_grid(theta, [2 * PAIRS, 1, size, size, size], align_corners=False)
        return F.grid_sample(pairs.images.flatten(0, 1), grid, align_corners=False)

    variants["affine_grid + grid_sample, one per visit"] = warps
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) / PAIRS * 1000)
    print(f"views of {size}³ from {SOURCE}, {threads} thread(s), {ROUNDS} rounds, ms per pair")
    for name, values in times.items():
        print(f"  {name:<44}{sorted(values)[len(values) // 2]:8.1f}")


if __name__ == "__main__":
    main(*[int(argument) for argument in sys.argv[1:]])
