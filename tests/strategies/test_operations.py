"""How many operations a step asks a device for, beside the network: each would be a launch on a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from lssl.utils.operations import CountOperations

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("bench_operations", ROOT / "benchmarks" / "bench_operations.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

#: Most operations of a pair of views, every intensity change on.
VIEWS = 110
#: Strategy → most operations of its terms, network excluded.
TERMS = {
    "LongitudinalLocal, published": 190,
    "LongitudinalLocal, info_nce": 190,
    "LongitudinalLocal, recommended": 140,
    "PriorGuidedLocal, cosine": 140,
    "PriorGuidedLocal, info_nce": 140,
    "PriorGuidedLocal, vicreg": 160,
    "PriorGuidedLocal, cosine, 3 taps": 300,
    "GlobalContrastive, SimCLR": 140,
    "GlobalContrastive, MoCo": 140,
    "GlobalContrastive, BYOL": 140,
    "GlobalContrastive, VICReg": 140,
    "AnatomicalInvariance": 210,
    "AnatomicalEmbedding": 2400,
    "MaskedAutoencoder": 140,
}


def test_every_strategy_has_a_bound():
    assert set(TERMS) == set(bench.STRATEGIES)


@pytest.mark.parametrize("name", TERMS)
def test_a_step_asks_for_few_operations(name: str):
    parts = bench.operations(bench.built(name, 64), bench.batch(2, 80))
    for part, most in (("views", VIEWS), ("terms", TERMS[name])):
        counted = parts[part]
        assert 0 < counted.total <= most, f"{part}: {counted.total}, {counted.found.most_common(12)}"


def test_views_of_tensors_are_free_and_copies_are_not():
    tensor = torch.zeros(3, 4)
    with CountOperations() as operations:
        tensor.T[1:].unsqueeze(0).expand(2, -1, -1)
        assert operations.total == 0
        tensor.T.reshape(-1)
        tensor.add_(1)
        torch.stack([tensor, tensor])
    assert operations.found.keys() == {"aten.clone", "aten.add_", "aten.stack"}


def test_backward_passes_are_counted_and_excluded_modules_are_not():
    layer, x = nn.Linear(2, 2), torch.zeros(3, 2)
    with CountOperations() as operations, operations.without(layer):
        value = layer(x).sum()
    assert operations.found == {"aten.sum": 1}
    with CountOperations() as operations:
        value.backward()
    assert operations.total > 1
