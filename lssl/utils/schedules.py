"""Learning-rate schedules, stepped once per optimizer step; each is built from an optimizer and the total steps."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["ConstantLinear", "WarmupCosine"]


class WarmupCosine(LambdaLR):
    """Linear warm-up to the full learning rate, then a cosine down to ``min_share`` of it.

    Args:
        optimizer: given by the framework.
        total_steps: given by the framework.
        warmup: share of the steps spent warming up.
        min_share: last learning rate, as a share of the full one.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.05, min_share: float = 0.0) -> None:
        rise = max(1, round(warmup * total_steps))

        def factor(step: int) -> float:
            if step < rise:
                return (step + 1) / rise
            progress = min(1.0, (step - rise) / max(1, total_steps - rise))
            return min_share + (1 - min_share) * 0.5 * (1 + math.cos(math.pi * progress))

        super().__init__(optimizer, factor)


class ConstantLinear(LambdaLR):
    """Constant, then linear to zero: the schedule of Ren et al. (2022), with 20 and 200 epochs.

    Args:
        optimizer: given by the framework.
        total_steps: given by the framework.
        constant: share of the steps at the full learning rate.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, constant: float = 20 / 220) -> None:
        held = round(constant * total_steps)

        def factor(step: int) -> float:
            return 1 - max(0, step - held) / (total_steps - held + 1)

        super().__init__(optimizer, factor)
