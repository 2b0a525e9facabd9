"""How many operations a step asks a device for, beside the network: each would be a launch on a GPU."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from torch import nn

from lssl.utils.operations import CountOperations
from lssl.views.sampler import ViewSampler

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("bench_operations", ROOT / "benchmarks" / "bench_operations.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

#: Most operations of a pair of views, every intensity change on.
VIEWS = 110
#: Most operations of a strategy's terms, network excluded.
FEW = 140
#: Most operations of views and terms together.
ALL = 250
#: Strategies whose terms need more than FEW, and why.
TERMS = dict.fromkeys(bench.STRATEGIES, FEW) | {
    "AnatomicalInvariance": 150,  # five heads of three layers, two attentions, four times prototypes
    "SiameseMaskedAutoencoder": 168,  # its decoder is a network of its own: four layers of a transformer with 16 each
}


def test_every_strategy_is_counted():
    counted = {name.split(",")[0] for name in TERMS}
    assert counted == {point.name for point in entry_points(group="lssl.strategies")}


@pytest.mark.parametrize("name", TERMS)
def test_a_step_asks_for_few_operations(name: str):
    size, source = (64, 80) if "PriorGuided" in name else (32, 40)  # the former refuses views of 32 voxels
    parts = bench.operations(bench.built(name, size), bench.batch(2, source))
    for part, most in (("views", VIEWS), ("terms", TERMS[name])):
        counted = parts[part]
        assert 0 < counted.total <= most, f"{part}: {counted.total}, {counted.found.most_common(12)}"
    assert parts["views"].total + parts["terms"].total <= ALL


@pytest.mark.parametrize("seed", range(4))
def test_views_with_changes_of_some_images_alone_ask_for_few_operations_too(seed: int):
    views = ViewSampler(32)
    for change in views.transforms:
        change.p = 0.5
    generator = torch.Generator().manual_seed(seed)
    with CountOperations() as operations:
        views(bench.batch(2, 40), generator)
    assert 0 < operations.total <= VIEWS


@pytest.mark.parametrize(
    "name",
    ["LongitudinalLocal, published", "LongitudinalLocal, info_nce", "AnatomicalInvariance", "SiameseMaskedAutoencoder"],
)
def test_a_step_reads_nothing_back_from_its_device(name: str, monkeypatch: pytest.MonkeyPatch):
    """A tensor of the device ``meta`` has no values: whatever would wait for them fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which does not know that device
    strategy = bench.built(name, 32).to("meta")
    strategy.views.transforms = []
    batch = bench.batch(2, 40).to("meta")
    first, second = strategy.draw_views(batch)
    terms = strategy.terms(first, second, batch)
    assert {value.device.type for value in terms.values()} == {"meta"}
    with pytest.raises((NotImplementedError, RuntimeError)):
        next(iter(terms.values())).item()


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
