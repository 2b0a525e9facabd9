"""Small images in which one pattern grows with age, and others change with no rule: the truth that a method must find.

Every image is a sum of stripes along the three axes and a brightness, in noise. The stripes along the first axis grow
by ``RATE`` a year, from a height of each subject's own. All else is drawn anew for every visit, so that a network that
has learned nothing cannot tell the order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.networks.backbone import Backbone
from lssl.strategy import Strategy
from lssl.views.sampler import ViewSampler

SIZE, SOURCE, RATE, POOL = 12, 14, 0.1, 128


def backbone() -> Backbone:
    """Two strided convolutions and a raw one, as the default U-Net's taps are."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 16)):
        layers += [nn.Conv3d(before, after, 3, stride=2, padding=1), nn.BatchNorm3d(after), nn.ReLU()]
    return Backbone(nn.Sequential(*layers, nn.Conv3d(16, 16, 1)), {"deep": "6"})


def views() -> ViewSampler:
    """Shifted crops of one box, without other changes."""
    return ViewSampler(SIZE, geometry="shared", affine_probability=0.0, flip=(0.0, 0.0, 0.0), transforms=[])


def planted(pairs: int, seed: int, longest: float = 6.0) -> PairBatch:
    """Pairs of subjects of their own, 1 to ``longest`` years apart, in time order."""
    draw = torch.Generator().manual_seed(seed)
    years = 1 + (longest - 1) * torch.rand(pairs, generator=draw)
    times = torch.stack([torch.zeros(pairs), years], 1)
    own = 1 + 0.2 * torch.randn(pairs, 1, generator=draw)
    images = 0.05 * torch.randn(pairs, 2, SOURCE, SOURCE, SOURCE, generator=draw)
    wave = (torch.arange(SOURCE) * math.pi / 2).cos()
    heights = 1 + 0.3 * torch.randn(pairs, 2, 3, generator=draw)
    for axis, height in enumerate((own + RATE * times, heights[..., 0], heights[..., 1])):
        shape = [SOURCE if other == axis else 1 for other in range(3)]
        images += height[..., None, None, None] * wave.view(shape)
    images += heights[..., 2, None, None, None]
    affines = torch.eye(4, dtype=torch.float64).repeat(pairs, 2, 1, 1)
    extent = torch.full((pairs, 2, 3), SOURCE)
    foreground = torch.ones(pairs, 2, SOURCE, SOURCE, SOURCE, dtype=torch.bool)
    subject, session = torch.arange(pairs) + 1000 * seed, torch.arange(2 * pairs).view(pairs, 2)
    return PairBatch(
        images[:, :, None], affines, extent, foreground, 60 + times, times, None, subject, session + 2000 * seed
    )


def shuffled(batch: PairBatch, draw: torch.Generator) -> PairBatch:
    """The control: the times of each pair say nothing about its images."""
    swap = torch.rand(len(batch), generator=draw) < 0.5
    times = torch.where(swap[:, None], batch.times.flip(1), batch.times)
    return dataclasses.replace(batch, times=times[torch.randperm(len(batch), generator=draw)])


def train(strategy: Strategy, steps: int, control: bool = False, pairs: int = 16, rate: float = 1e-2) -> Strategy:
    """A few steps of AdamW on pairs out of a pool; in evaluation mode afterwards."""
    strategy.train()
    pool = planted(POOL, 0)
    optimizer = torch.optim.AdamW([p for p in strategy.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        strategy.generator.manual_seed(step)
        batch = pool.rows(torch.randperm(POOL, generator=strategy.generator)[:pairs])
        if control:
            batch = shuffled(batch, strategy.generator)
        loss = strategy.total(strategy.losses(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        strategy.on_step_end((step + 1) / steps)
    return strategy.eval()


@torch.no_grad()
def held_out(
    strategy: Strategy, compare: Callable[[Tensor, Tensor], tuple[Tensor, ...]], pairs: int = 128, seed: int = 1
) -> tuple[tuple[Tensor, ...], Tensor]:
    """``compare(earlier, later)`` of new subjects' images, and the years between them."""
    batch = planted(pairs, seed)
    first, second = strategy.views.centred(batch)
    return compare(first.image, second.image), batch.times[:, 1]
