"""Projectors: layers as stated, normalised over rows, refused where normalisation has nothing to go by."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lssl.networks.heads import Projector, StackedHeads, StackedLinear, TapHeads
from lssl.utils.errors import InputError


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_widths_and_biases(layers: int):
    head = Projector(6, 10, 4, layers=layers, last_norm=True)
    linear = [module for module in head if isinstance(module, nn.Linear)]
    assert [m.in_features for m in linear] == [6, 10, 10][:layers]
    assert [m.out_features for m in linear] == [*[10, 10][: layers - 1], 4]
    assert all(m.bias is None for m in linear)  # a norm follows each
    assert isinstance(head[-1], nn.BatchNorm1d)
    assert not head[-1].affine
    assert sum(isinstance(module, nn.ReLU) for module in head) == layers - 1
    assert Projector(6, 10, 4, layers=layers)[-1].bias is not None


def test_batch_norm_head_by_hand():
    torch.manual_seed(0)
    head, rows = Projector(6, 10, 4, last_norm=True), torch.randn(32, 6)

    def normal(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()

    hidden = F.relu(normal(rows @ head[0].weight.T))
    torch.testing.assert_close(head(rows), normal(hidden @ head[3].weight.T), rtol=1e-4, atol=1e-5)
    z = head(rows)
    torch.testing.assert_close(z.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.var(0, unbiased=False), torch.ones(4), rtol=1e-2, atol=1e-2)


def test_batch_norm_of_heads_is_torchs_and_can_be_synchronised():
    norm, torchs = Projector(6, 10, 4)[1], nn.BatchNorm1d(10)
    for _ in range(3):
        rows = 3 * torch.randn(8, 10) + 1
        assert torch.equal(norm(rows), torchs(rows))
    assert torch.equal(norm.running_var, torchs.running_var)
    assert torch.equal(norm.eval()(rows), torchs.eval()(rows))
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(Projector(6, 10, 4))[1], nn.SyncBatchNorm)


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_other_norms_treat_each_row_alone(norm: str):
    head, rows = Projector(6, 10, 4, norm=norm, last_norm=True), torch.randn(5, 6)
    torch.testing.assert_close(head(rows)[2:3], head(rows[2:3]))


def test_too_few_rows_for_batch_norm_are_refused_while_training_only():
    head = Projector(6, 10, 4)
    with pytest.raises(InputError, match=r"batch normalisation needs at least 4 rows and got 3 .* larger batch"):
        head(torch.randn(3, 6))
    head(torch.randn(4, 6))
    assert head.eval()(torch.randn(1, 6)).shape == (1, 4)
    assert Projector(6, 10, 4, norm="layer")(torch.randn(1, 6)).shape == (1, 4)


def test_heads_of_taps_are_apart_whatever_the_taps_are_called():
    """A dot is no part of a submodule's name; neither `a.b` and `a_b` nor the names of methods may collide."""
    heads = TapHeads({name: nn.Linear(3, width) for name, width in (("a.b", 2), ("a_b", 4), ("maps", 5))})
    assert [heads.rows(tap, torch.zeros(1, 6, 3)).shape[2] for tap in ("a.b", "a_b", "maps")] == [2, 4, 5]
    assert heads.maps("a.b", torch.zeros(1, 3, 2, 2, 2)).shape == (1, 2, 2, 2, 2)
    assert "a.b" in heads
    assert "b" not in heads
    assert len(heads) == len(heads.state_dict()) / 2 == 3


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("last_norm", [False, True])
def test_stacked_heads_are_projectors_side_by_side(layers: int, last_norm: bool):
    """Weights copied from one projector per tap: outputs, gradients and running statistics are theirs."""
    channels = {"a.b": 3, "c": 5}
    stacked = StackedHeads(channels, 6, 4, layers, last_norm)
    alone = [Projector(width, 6, 4, layers, last_norm=last_norm) for width in channels.values()]
    for number, (one, first) in enumerate(zip(alone, stacked.first.values(), strict=True)):
        with torch.no_grad():
            linear = [module for module in one if isinstance(module, nn.Linear)]
            first.load_state_dict(linear[0].state_dict())
            for mine, theirs in zip([m for m in stacked.rest if isinstance(m, StackedLinear)], linear[1:], strict=True):
                mine.weight[number] = theirs.weight.T
                assert (mine.bias is None) == (theirs.bias is None)
                if theirs.bias is not None:
                    mine.bias.unflatten(0, (2, -1))[number] = theirs.bias
    rows = [torch.randn(7, width) for width in channels.values()]
    found = stacked(rows)
    expected = torch.stack([one(values) for one, values in zip(alone, rows, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    target = torch.randn_like(expected)
    (found * target).sum().backward()
    (expected * target).sum().backward()
    for first, one in zip(stacked.first.values(), alone, strict=True):
        torch.testing.assert_close(first.weight.grad, one[0].weight.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        stacked.eval()(rows),
        torch.stack([one.eval()(values) for one, values in zip(alone, rows, strict=True)]),
        rtol=1e-4,
        atol=1e-5,
    )


def test_stacked_heads_of_one_width_take_their_rows_together():
    stacked, rows = StackedHeads({"a": 3, "b": 3}, 6, 4), torch.randn(2, 7, 3)
    assert isinstance(stacked.first, StackedLinear)
    torch.testing.assert_close(stacked(rows), stacked(list(rows)))
    torch.testing.assert_close(stacked(rows[:, :6]), stacked(list(rows[:, :6].unflatten(1, (2, 3)))))
    weights = [[layer.weight[n] for layer in (stacked.first, stacked.rest[2])] for n in (0, 1)]
    hidden = [values @ first for values, (first, _) in zip(rows, weights, strict=True)]
    hidden = [F.batch_norm(values, None, None, training=True).relu() for values in hidden]
    biases = stacked.rest[2].bias.unflatten(0, (2, -1))
    expected = [values @ last + bias for values, (_, last), bias in zip(hidden, weights, biases, strict=True)]
    torch.testing.assert_close(stacked(rows), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_stacked_heads_start_as_torchs_linear_layers_do():
    torch.manual_seed(0)
    stacked = StackedHeads(dict.fromkeys("abc", 8), 50, 40)
    weight, bias = stacked.rest[-1].weight, stacked.rest[-1].bias
    assert 0.98 * 50**-0.5 < weight.abs().max() <= 50**-0.5
    assert weight.std().item() == pytest.approx((1 / (3 * 50)) ** 0.5, rel=0.03)
    assert bias.ndim == 1  # no weight decay
    with pytest.raises(InputError, match="at least 4 rows and got 3"):
        stacked([torch.zeros(3, 8)] * 3)
