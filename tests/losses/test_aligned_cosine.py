"""Agreement of aligned voxels against a loop over samples and voxels in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lssl.losses import AlignedCosine

WEIGHTS = torch.tensor([1.0, 0.0, 0.5])


def inputs(n: int = 7, d: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, targets and masks; voxels of very different norms, and different numbers of them per sample."""
    draw = torch.Generator().manual_seed(seed)
    scales = [10 ** (2 * torch.rand(len(WEIGHTS), n, 1, generator=draw) - 1) for _ in range(2)]
    query, target = (scale * torch.randn(len(WEIGHTS), n, d, generator=draw) for scale in scales)
    valid = torch.zeros(len(WEIGHTS), n, dtype=torch.bool)
    for sample, count in enumerate((2, 4, 6)):
        valid[sample, torch.randperm(n, generator=draw)[:count]] = True
    return query, target, valid


def by_loops(query, target, valid, weight) -> float:
    total = 0.0
    for q, t, seen, w in zip(query.double(), target.double(), valid, weight.tolist(), strict=True):
        distances = []
        for x in range(len(q)):
            if seen[x]:
                distances.append(((q[x] / q[x].norm() - t[x] / t[x].norm()) ** 2).sum().item())
        total += w * sum(distances) / len(distances)
    return total / weight.sum().item()


@pytest.mark.parametrize("weight", [WEIGHTS, torch.ones(3), torch.tensor([0.0, 0.0, 3.0])])
def test_value_by_loops(weight: Tensor):
    assert AlignedCosine()(*inputs(), weight).item() == pytest.approx(by_loops(*inputs(), weight), rel=1e-5)


def test_between_zero_and_four():
    query, _, valid = inputs()
    assert AlignedCosine()(query, 2 * query, valid, WEIGHTS).item() == pytest.approx(0, abs=1e-5)
    assert AlignedCosine()(query, -2 * query, valid, WEIGHTS).item() == pytest.approx(4, abs=1e-5)


def test_every_voxel_is_normalised_by_itself():
    query, target, valid = inputs()
    value = AlignedCosine()(query, target, valid, WEIGHTS)
    scale = torch.linspace(0.01, 50, 7)[None, :, None]
    torch.testing.assert_close(AlignedCosine()(scale * query, target, valid, WEIGHTS), value)
    torch.testing.assert_close(AlignedCosine()(query, scale * target, valid, WEIGHTS), value)
    whole = (2 - 2 * torch.cosine_similarity((scale * query).flatten(1), target.flatten(1))).mean()
    assert (whole - value).abs() > 0.1  # what a map of unit length gives is something else


def test_samples_count_alike_however_many_voxels_they_share():
    query, target, valid = inputs()
    ones = torch.ones(3)
    each = [AlignedCosine()(*(rows[b : b + 1] for rows in (query, target, valid, ones))).item() for b in range(3)]
    assert AlignedCosine()(query, target, valid, ones).item() == pytest.approx(sum(each) / 3, rel=1e-6)
    pooled = (2 - 2 * torch.cosine_similarity(query, target, dim=-1))[valid].mean().item()
    assert abs(pooled - sum(each) / 3) > 0.01


def test_invalid_voxels_say_nothing():
    query, target, valid = inputs()
    query.requires_grad_()
    value = AlignedCosine()(query, target, valid, torch.ones(3))
    garbage = torch.where(valid[..., None], target, torch.full_like(target, -1e6))
    assert torch.equal(AlignedCosine()(query, garbage, valid, torch.ones(3)), value)
    gradient = torch.autograd.grad(value, query)[0]
    assert torch.equal(gradient.abs().sum(-1) > 0, valid)


def test_gradient_is_that_of_the_formula_and_spares_the_target():
    query, target, valid = (rows.double() if rows.is_floating_point() else rows for rows in inputs())
    query.requires_grad_()
    target.requires_grad_()
    AlignedCosine()(query, target, valid, WEIGHTS).backward()
    assert target.grad is None
    for sample in (0, 2):
        index = (sample, valid[sample].nonzero()[0].item(), 3)
        step = 1e-4 * query[index[:2]].norm().item()
        ends = []
        for sign in (1, -1):
            moved = query.detach().clone()
            moved[index] += sign * step
            ends.append(by_loops(moved, target.detach(), valid, WEIGHTS))
        expected = (ends[0] - ends[1]) / (2 * step)
        assert abs(expected) > 1e-4
        assert query.grad[index].item() == pytest.approx(expected, rel=1e-3)


def test_a_sample_of_weight_zero_has_a_gradient_of_exact_zeros():
    query, target, valid = inputs()
    query.requires_grad_()
    value = AlignedCosine()(query, target, valid, WEIGHTS)
    value.backward()
    assert torch.equal(query.grad[1], torch.zeros(7, 5))
    assert (query.grad[[0, 2]].abs().sum((1, 2)) > 0).all()
    without = AlignedCosine()(*(rows[[0, 2]] for rows in (query, target, valid, WEIGHTS)))
    torch.testing.assert_close(without, value)


@pytest.mark.parametrize("shared", [True, False])
def test_no_weight_at_all_gives_zero_and_keeps_its_graph(shared: bool):
    query, target, valid = inputs()
    query.requires_grad_()
    value = AlignedCosine()(query, target, valid & shared, torch.zeros(3))
    assert value.item() == 0
    value.backward()
    assert torch.equal(query.grad, torch.zeros(3, 7, 5))


def test_float32_under_autocast():
    expected = AlignedCosine()(*inputs(), WEIGHTS)
    query, target, valid = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(AlignedCosine()(*inputs(), WEIGHTS), expected)
        half = AlignedCosine()(query.bfloat16(), target.bfloat16(), valid, WEIGHTS)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(by_loops(query.bfloat16(), target.bfloat16(), valid, WEIGHTS), rel=1e-5)


def test_sets_of_points_are_as_each_alone():
    query, target, valid = inputs()
    counts, weight = [2, query.shape[-2] - 2], torch.stack([WEIGHTS, WEIGHTS.flip(0)])
    found = AlignedCosine()(query, target, valid, weight, counts)
    parts = [zip(*(rows.split(counts, axis) for rows, axis in ((query, 1), (target, 1), (valid, 1))), strict=True)]
    expected = [AlignedCosine()(*rows, each) for rows, each in zip(*parts, weight, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))
