"""What the metrics on several visits share: ranks add up, and their examples hold."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

from lssl.metrics import PercentChange, ReversalRate, TemporalConsistency, TrajectoryError

MODULES = ("percent_change", "reversal_rate", "temporal_consistency", "trajectory_error")


def volumes(visits: int, draw: torch.Generator) -> torch.Tensor:
    return 1000 * torch.rand(visits, 3, generator=draw)


def updates(kind: type, draw: torch.Generator) -> list[tuple[torch.Tensor, ...]]:
    """Five updates of different sizes."""
    if kind is TemporalConsistency:
        return [tuple(torch.randint(-1, 3, (2, b, 4, 4, 4), generator=draw)) for b in (1, 2, 3, 1, 2)]
    made: list[tuple[torch.Tensor, ...]] = [(volumes(v, draw), volumes(v, draw)) for v in (2, 3, 4, 2, 5)]
    if kind is TrajectoryError:
        made = [(*both, torch.rand(len(both[0]), generator=draw).cumsum(0)) for both in made]
    return made


@pytest.mark.parametrize("kind", [PercentChange, ReversalRate, TemporalConsistency, TrajectoryError])
def test_two_ranks_of_unequal_share_give_what_one_gives(kind):
    made = updates(kind, torch.Generator().manual_seed(0))
    whole, *ranks = (kind(3) for _ in range(3))
    for metric, part in ((whole, made), (ranks[0], made[:1]), (ranks[1], made[1:])):
        for update in part:
            metric.update(*update)
    expected = whole.compute()

    for name, default in whole._defaults.items():  # what torchmetrics does between processes: gather, then reduce
        states = torch.stack([getattr(rank, name) for rank in ranks])
        assert states.shape[1:] == default.shape
        setattr(ranks[0], name, whole._reductions[name](states))
    ranks[0]._computed = None
    torch.testing.assert_close(ranks[0].compute(), expected)
    assert not torch.allclose(ranks[1].compute(), expected)
    whole.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert whole.compute().isnan().all()


@pytest.mark.parametrize("module", MODULES)
def test_examples_hold(module):
    result = doctest.testmod(importlib.import_module(f"lssl.metrics.{module}"))
    assert result.failed == 0
