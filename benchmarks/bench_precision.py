"""bf16 against float32: the error of each term's gradient, and loss curves beside the spread of seeds.

python benchmarks/bench_precision.py [steps] [seeds]

The gradient is that of the network's weights, at initial weights, for one batch: |g₁₆ - g₃₂| / |g₃₂| under
``torch.autocast``, as ``--trainer.precision bf16-mixed`` uses it. The curves are those of dense InfoNCE on a narrow
network; the loss is the mean of the last tenth of the steps. A CPU without bf16 rounds as others do, but slowly.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.nn.functional as F
from bench_operations import STRATEGIES, batch, built

from lssl import PairBatch, Strategy
from lssl.datamodules.phantom import PhantomDataModule

SIDE, CURVE = 64, 48  # of 32³ views the bottleneck has two voxels a side, of which bf16 gradients are wrong on CPUs
CHOSEN = [name for name in STRATEGIES if not name.endswith("recommended")]


def gradients(strategy: Strategy, pairs: PairBatch, half: bool) -> dict[str, torch.Tensor]:
    """Term → gradient of the network's weights; draws are the same each time."""
    strategy.seed("fit", 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        first, second = strategy.draw_views(pairs)
        terms = strategy.terms(first, second, pairs)
    weights = [weight for weight in strategy.backbone.parameters() if weight.requires_grad]
    found = {}
    for name, value in terms.items():
        each = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
        found[name] = torch.cat([part.flatten().double() for part in each if part is not None])
    return found


def errors() -> None:
    """Prints a row for each term."""
    print(f"gradients in bf16, views of {SIDE}³: relative error, and cosine with the one in float32")
    pairs = batch(2, SIDE + 16)
    smooth = F.avg_pool3d(pairs.images.flatten(0, 1), 5, 1, 2).view_as(pairs.images)
    pairs.images = pairs.images.lerp(smooth, 0.9)
    for name in CHOSEN:
        torch.manual_seed(0)
        strategy = built(name, SIDE)
        state = {key: value.clone() for key, value in strategy.state_dict().items()}
        exact = gradients(strategy, pairs, False)
        strategy.load_state_dict(state)
        rounded = gradients(strategy, pairs, True)
        for term, gradient in exact.items():
            if gradient.norm() == 0:
                continue
            error = (rounded[term] - gradient).norm() / gradient.norm()
            cosine = torch.cosine_similarity(rounded[term], gradient, 0)
            print(f"  {name:<36}{term:<18}{error:8.3f}{cosine:8.3f}", flush=True)


def curve(data: list[PairBatch], seed: int, half: bool, steps: int) -> np.ndarray:
    """Losses of the steps."""
    torch.manual_seed(seed)
    strategy = built("LongitudinalLocal, recommended", CURVE)
    strategy.seed("fit", seed)
    optimizer, losses = torch.optim.AdamW(strategy.parameters(), 1e-3), []
    for number in range(steps):
        pairs = data[number % len(data)]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = strategy.total(strategy.terms(*strategy.draw_views(pairs), pairs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def main(steps: int = 300, seeds: int = 3) -> None:
    """Prints both tables."""
    torch.set_num_threads(1)
    errors()
    source = PhantomDataModule(size=CURVE + 8, subjects=4, split=[1.0, 0.0, 0.0], num_workers=0, batch_size=1)
    source.setup()
    data = [pairs.to("cpu") for pairs in source.train_dataloader()]
    print(f"loss after {steps} steps, mean of the last {steps // 10}, dense InfoNCE and reconstruction")
    last: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(seeds):
        for half, values in last.items():
            values.append(curve(data, seed, half, steps)[-(steps // 10) :].mean())
            print(f"  seed {seed}, {'bf16' if half else 'float32':<10}{values[-1]:.4f}", flush=True)
    apart, spread = np.mean(last[True]) - np.mean(last[False]), np.std(last[False], ddof=1)
    print(f"  apart by {apart:+.4f}; standard deviation between seeds {spread:.4f}")


if __name__ == "__main__":
    main(*[int(argument) for argument in sys.argv[1:]])
