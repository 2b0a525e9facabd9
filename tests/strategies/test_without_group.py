"""Collectives outside a group, or with no weight at all, are plain."""

from __future__ import annotations

import pytest
import torch
from torch import distributed
from two_ranks import common

from lssl.losses import NTXent
from lssl.utils.distributed import gather, no_sync, rank, weighted_mean, world_size
from lssl.utils.errors import InputError


def test_without_a_group_everything_is_plain():
    assert (world_size(), rank()) == (1, 0)
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather(rows) is rows
    values, weight = torch.tensor([1.0, 3.0, 8.0], requires_grad=True), torch.tensor([1.0, 0.0, 3.0])
    assert weighted_mean(values).item() == 4
    mean = weighted_mean(values, weight)
    assert mean.item() == 25 / 4
    assert torch.autograd.grad(mean, values)[0].tolist() == [0.25, 0, 0.75]
    with no_sync():
        assert (world_size(), rank()) == (1, 0)


def test_gather_hands_contiguous_memory_to_the_backend(monkeypatch):
    """Backends exchange raw memory: some refuse other layouts, some mix up the elements (pytorch/pytorch#163483)."""
    handed = []
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "all_gather", lambda parts, own: handed.extend([*parts, own]))
    NTXent()(torch.randn(3, 4), torch.randn(3, 4), torch.arange(3))
    assert len(handed) == 6
    assert all(tensor.is_contiguous() for tensor in handed)


def test_no_weight_at_all_is_an_exact_zero_with_a_graph():
    values = torch.randn(3, requires_grad=True)
    mean = weighted_mean(values, torch.zeros(3))
    assert mean.item() == 0
    assert torch.autograd.grad(mean, values)[0].tolist() == [0, 0, 0]


def test_weights_below_one_are_still_a_mean():
    assert weighted_mean(torch.full((4,), 3.0), torch.full((4,), 1e-3)).item() == pytest.approx(3)


def test_weights_receive_no_gradient_through_their_sum():
    values, weight = torch.tensor([1.0, 3.0]), torch.ones(2, requires_grad=True)
    assert torch.autograd.grad(weighted_mean(values, weight), weight)[0].tolist() == [0.5, 1.5]


def test_alone_ends_with_an_error_too(monkeypatch):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    with pytest.raises(InputError, match="'neverland'"), no_sync():
        common()["backbone"].check_taps(["neverland"])
    assert world_size() == 3
