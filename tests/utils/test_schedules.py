"""Learning rates at a few steps, in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from lssl.utils.schedules import ConstantLinear, WarmupCosine


def rates(schedule: type, steps: int, **settings) -> list[float]:
    """Rate used at each of the steps, and the one that would follow."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, used = schedule(optimizer, steps, **settings), []
    for _ in range(steps + 1):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return used


def test_warmup_then_cosine():
    used = rates(WarmupCosine, 100, warmup=0.1, min_share=0.2)
    assert used[:10] == pytest.approx([2 * (i + 1) / 10 for i in range(10)])
    assert used[10] == pytest.approx(2.0)
    assert used[55] == pytest.approx(2 * (0.2 + 0.8 * 0.5))  # half way down
    assert used[32] == pytest.approx(2 * (0.2 + 0.4 * (1 + math.cos(math.pi * 22 / 90))))
    assert used[100] == pytest.approx(0.4)
    assert max(used) == pytest.approx(2.0)


def test_constant_then_linear_as_published():
    """20 epochs at the full rate, then 200 down to almost zero: the published rule, one step an epoch."""
    used = rates(ConstantLinear, 220)
    published = [2 * (1 - max(0, epoch - 20) / 201) for epoch in range(220)]
    assert used[:220] == pytest.approx(published)
    assert used[219] > 0


@pytest.mark.parametrize("schedule", [WarmupCosine, ConstantLinear])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_short_runs_have_a_rate(schedule: type, steps: int):
    used = rates(schedule, steps)
    assert used[0] == pytest.approx(2.0)
    assert all(0 <= rate <= 2 for rate in used)
