"""Prints what one pair of views costs, beside the same work in TorchIO, MONAI and batchgeneratorsv2, and two warps.

python benchmarks/bench_views.py [size] [threads] [rounds]

TorchIO once as in the published code, on whole volumes that are cropped at the end, and once cropped first.
batchgeneratorsv2 has no bias field and draws brightness and contrast instead; its rows are missing where the package
is not installed. Variants take turns in one run: compare ratios only. With one thread, time is the processor's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchio as tio
from monai import transforms as mt

from lssl.data.batch import PairBatch
from lssl.utils.allocator import keep_freed_memory
from lssl.views.intensity import BiasField, Blur, Gamma, Noise
from lssl.views.sampler import ViewSampler

SOURCE, PAIRS = (160, 192, 160), 2
#: Probabilities of the published code; bias field stands for brightness and contrast of batchgeneratorsv2, too.
PUBLISHED = {"flip": 0.5, "affine": 0.5, "blur": 0.3, "noise": 0.25, "bias": 0.2, "gamma": 0.3, "motion": 0.1}
ALWAYS = {**dict.fromkeys(PUBLISHED, 1.0), "motion": 0.0}
OURS = "lssl shared, "


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


def monai_pipeline(size: int, p: dict[str, float]) -> Callable[[torch.Tensor], Any]:
    """Crop, mirror, affine and the four intensity changes of the published code."""
    return mt.Compose(
        [
            mt.RandSpatialCrop([size] * 3, random_size=False),
            mt.RandFlip(prob=p["flip"], spatial_axis=0),
            mt.RandAffine(prob=p["affine"], rotate_range=[0.17] * 3, scale_range=[0.2] * 3, padding_mode="zeros"),
            mt.RandGaussianSmooth((0, 2), (0, 2), (0, 2), prob=p["blur"]),
            mt.RandGaussianNoise(prob=p["noise"], std=0.25),
            mt.RandBiasField(prob=p["bias"]),
            mt.RandAdjustContrast(prob=p["gamma"], gamma=(0.74, 1.35)),
        ]
    )


def torchio_pipeline(size: int, p: dict[str, float], crop_first: bool) -> Callable[[torch.Tensor], Any]:
    """The published chain, with the crop first or last."""
    chain = [
        tio.RandomFlip(axes=0, flip_probability=p["flip"]),
        tio.RandomAffine(scales=0.2, degrees=10, p=p["affine"]),
        tio.RandomBlur(p=p["blur"]),
        tio.RandomNoise(p=p["noise"]),
        tio.RandomBiasField(p=p["bias"]),
        tio.RandomGamma(p=p["gamma"]),
        tio.RandomMotion(p=0 if crop_first else p["motion"]),
    ]
    sampler, transform = tio.UniformSampler(size), tio.Compose(chain)

    def run(image: torch.Tensor) -> Any:
        subject = tio.Subject(image=tio.ScalarImage(tensor=image))
        if crop_first:
            return transform(next(sampler(subject, 1)))
        return next(sampler(transform(subject), 1))

    return run


def bg_pipeline(size: int, p: dict[str, float]) -> Callable[[torch.Tensor], Any] | None:
    """The nearest chain of batchgeneratorsv2; ``None`` if it is not installed."""
    try:
        from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
        from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
        from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
        from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
        from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
        from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
        from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
        from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
        from batchgeneratorsv2.transforms.utils.random import RandomTransform
    except ImportError as missing:
        print(f"batchgeneratorsv2 is left out: {missing}")
        return None
    affine = {"p_rotation": p["affine"], "rotation": (-0.17, 0.17), "p_scaling": p["affine"], "scaling": (0.8, 1.2)}
    chain = ComposeTransforms(
        [
            SpatialTransform((size,) * 3, 0, random_crop=True, **affine),
            RandomTransform(MirrorTransform((0,)), p["flip"]),
            RandomTransform(GaussianBlurTransform((0.01, 2.0)), p["blur"]),
            RandomTransform(GaussianNoiseTransform((0, 0.06)), p["noise"]),
            RandomTransform(MultiplicativeBrightnessTransform(BGContrast((0.75, 1.25)), False), p["bias"]),
            RandomTransform(ContrastTransform(BGContrast((0.75, 1.25)), True, False), p["bias"]),
            RandomTransform(GammaTransform((0.74, 1.35), 0, False, 1, 0), p["gamma"]),
        ]
    )
    return lambda image: chain(image=image)


def variants(size: int, pairs: PairBatch) -> dict[str, Callable[[], Any]]:
    """Name → one round over all pairs."""
    generator = torch.Generator().manual_seed(0)
    images = list(pairs.images.flatten(0, 1))
    common = {"size": (size,) * 3, "foreground": False}
    shared = {**common, "geometry": "shared", "intensity": "shared"}
    found: dict[str, Callable[[], Any]] = {}
    for name, p in (("published p", PUBLISHED), ("all p=1", ALWAYS)):
        changes = [Blur(p["blur"]), Noise(p["noise"]), BiasField(p["bias"]), Gamma(p["gamma"])]
        for kind, options in (("shared", shared), ("independent", common)):
            sampler = ViewSampler(**options, transforms=changes, affine_probability=p["affine"])
            found[f"lssl {kind}, {name}"] = lambda sampler=sampler: sampler(pairs, generator)
        peers = {
            "torchio, whole volume": torchio_pipeline(size, p, crop_first=False),
            "torchio, crop first": torchio_pipeline(size, p, crop_first=True),
            "MONAI": monai_pipeline(size, p),
            "batchgeneratorsv2": bg_pipeline(size, p),
        }
        for peer, pipeline in peers.items():
            if pipeline is not None and not (peer == "torchio, whole volume" and p is ALWAYS):
                found[f"{peer}, {name}"] = lambda pipeline=pipeline: [pipeline(image) for image in images]
    theta = torch.eye(3, 4).repeat(2 * PAIRS, 1, 1)

    def warps() -> torch.Tensor:
        grid = F.affine_grid(theta, [2 * PAIRS, 1, size, size, size], align_corners=False)
        return F.grid_sample(pairs.images.flatten(0, 1), grid, align_corners=False)

    warp = ViewSampler(**shared, transforms=[], affine_probability=1.0)
    found["lssl shared, warp alone"] = lambda: warp(pairs, generator)
    found["affine_grid + grid_sample, one per visit, warp alone"] = warps
    return found


def main(size: int = 96, threads: int = 1, rounds: int = 6) -> None:
    """Times each variant in turn and prints means in ms per pair, as transforms are drawn, and times ours."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # as `lssl fit` does
    clock = time.process_time if threads == 1 else time.perf_counter
    tried = variants(size, batch())
    times: dict[str, list[float]] = {name: [] for name in tried}
    for number in range(rounds + 1):
        for name, run in tried.items():
            start = clock()
            run()
            if number:
                times[name].append((clock() - start) / PAIRS * 1000)
    mean = {name: sum(values) / rounds for name, values in times.items()}
    print(f"views of {size}³ from {SOURCE}, {threads} thread(s), {rounds} rounds, mean ms per pair, × lssl shared")
    for name, value in mean.items():
        own = mean[OURS + name.rsplit(", ", 1)[1]]
        print(f"  {name:<54}{value:8.1f}{value / own:7.2f}")


if __name__ == "__main__":
    main(*[int(argument) for argument in sys.argv[1:]])
