"""The published step of Ren et al. (NeurIPS 2022) as a yardstick, beside ours, in one run.

The yardstick is plain PyTorch: reflect padding, float32, nine projectors 2048 wide, 128 voxels per tap drawn by a
permutation of the lattice, five terms, Adam. Views are left out of both sides.

python benchmarks/bench_published.py [side of the views] [pairs] [repeats] [0 to leave out bf16]

With one thread, time is the processor's. A CPU without bf16 hardware emulates it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from bench_strategies import batch
from torch import Tensor, nn

from lssl import Backbone, ViewSampler
from lssl.networks.backbone import unet, unet_taps
from lssl.strategies.longitudinal_local import Cosine, InfoNCE, LongitudinalLocal
from lssl.utils.allocator import keep_freed_memory

SIDE, PAIRS, REPEATS, HALF = (
    int(argument) for argument in (*sys.argv[1:], *("64", "1", "3", "1")[len(sys.argv) - 1 :])
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH, POINTS = 2048, 128
BLOCKS = {"decoder.2": "upcat_3", "decoder.1": "upcat_2", "decoder.0": "upcat_1"}  # as in longitudinal_infonce.yaml


def projector(channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (channels, WIDTH):
        layers += [nn.Linear(width, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH, affine=False))


def predictor() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, WIDTH))


class Published(nn.Module):
    """Network, heads and loss without lssl's own code but the network's widths and the paths of its taps."""

    TAPS = ("encoder.0", "encoder.1", "encoder.2", "encoder.3", "bottleneck", "decoder.3", "decoder.2", "decoder.1")

    def __init__(self) -> None:
        super().__init__()
        self.network, paths = unet(), unet_taps()
        for module in self.network.modules():
            if isinstance(module, nn.Conv3d) and max(module.padding):
                module.padding_mode = "reflect"
        self.maps: dict[str, Tensor] = {}
        self.projectors, self.predictors = nn.ModuleDict(), nn.ModuleDict()
        for tap in (*self.TAPS, "skip.3"):
            module = self.network.get_submodule(paths[tap])
            module.register_forward_hook(lambda _, __, output, tap=tap: self.maps.update({tap: output}))
            key = tap.replace(".", "_")
            self.projectors[key], self.predictors[key] = projector(module.out_channels), predictor()
        self.to_image = nn.Conv3d(32, 1, 3, padding=1, padding_mode="reflect", bias=False)

    def loss(self, first: Tensor, second: Tensor) -> Tensor:
        images = torch.cat([first, second])
        image = self.to_image(self.network(images))
        total = 10 * F.mse_loss(image, images)
        rows: dict[str, Tensor] = {}
        size = {tap: self.maps[tap][0, 0].numel() for tap in self.maps}
        places = {tap: torch.randperm(size[tap], device=first.device)[:POINTS] for tap in self.TAPS}
        places["skip.3"] = places["decoder.3"]  # the same voxels before and after the skip connection
        for tap, chosen in places.items():
            key = tap.replace(".", "_")
            z = rows[tap] = self.projectors[key](self.maps[tap].flatten(2)[:, :, chosen].transpose(1, 2).flatten(0, 1))
            one, two = z.chunk(2)
            p, q = self.predictors[key](z).chunk(2)
            if tap != "skip.3":
                similar = F.cosine_similarity(p, two.detach()).mean() + F.cosine_similarity(q, one.detach()).mean()
                total = total - similar / 16
            for side in (one, two) if tap.startswith("decoder") else ():
                centred = side - side.mean(0)
                covariance = centred.T @ centred / (len(side) - 1)
                spread = (1 - (covariance.diagonal() + 1e-4).sqrt()).clamp_min(0).mean()
                off = (covariance.square().sum() - covariance.diagonal().square().sum()) / WIDTH
                total = total + 1e-3 / 8 * (spread + off)
        return total + 100 * F.cosine_similarity(rows["skip.3"], rows["decoder.3"]).square().mean()


def steps() -> dict[str, Callable[[], None]]:
    """Name → one forward and backward pass and the update."""
    torch.manual_seed(0)
    pairs, views = batch().to(DEVICE), ViewSampler(SIDE, transforms=[])
    first, second = views(pairs, torch.Generator().manual_seed(0))
    published = Published().to(DEVICE)

    def whole(module: nn.Module, loss: Callable[[], Tensor], half: bool, fused: bool) -> Callable[[], None]:
        optimizer = torch.optim.Adam(module.parameters(), 2e-4, (0.5, 0.999), fused=fused)

        def step() -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
                value = loss()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        return step

    found = {
        "published step": whole(published, lambda: published.loss(first.image, second.image), False, False),
    }
    off = {"variance": 0.0, "covariance": 0.0, "orthogonality": 0.0}
    recommended = {"objective": InfoNCE, "encoder_taps": (), "decoder_taps": list(BLOCKS), "samples": 256}
    recommended |= {"projector_layers": 2, "hidden": 128, "projection": 64, "foreground": True, "loss_weights": off}
    narrow = {"objective": partial(Cosine, predictor_hidden=64), "hidden": 256, "projection": 256}
    ours = {
        "longitudinal_local": ({}, None),
        "the same, heads 256 wide": (narrow, None),
        "longitudinal_infonce": (recommended, BLOCKS),
    }
    for name, (options, taps) in ours.items():
        task = LongitudinalLocal(Backbone(taps=taps, channels_last=True), views=views, **options).to(DEVICE)

        def loss(task: LongitudinalLocal = task) -> Tensor:
            return task.total(task.terms(first, second, pairs))

        for half in (False, True) if HALF else (False,):
            found[f"{name}, {'bf16' if half else 'float32'}"] = whole(task, loss, half, True)
    return found


def main() -> None:
    """Interleaves the steps; prints medians and how many times faster than the published one."""
    keep_freed_memory()  # as `lssl fit` does, and for both sides
    clock = time.perf_counter if DEVICE.type == "cuda" or torch.get_num_threads() > 1 else time.process_time
    candidates = steps()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(REPEATS + 1):
        for name, step in candidates.items():
            start = clock()
            step()
            times[name].append(clock() - start)
    median = {name: sorted(values[1:])[REPEATS // 2] for name, values in times.items()}
    print(
        f"{PAIRS} pair(s) of {SIDE}³ views on {DEVICE.type}, {torch.get_num_threads()} thread(s), median of {REPEATS}"
    )
    for name, value in median.items():
        print(f"{name:<32}{1000 * value:>9.0f} ms{median['published step'] / value:>7.2f}× the published speed")


if __name__ == "__main__":
    main()
