"""Projectors: layers as stated, normalised over rows, refused where normalisation has nothing to go by."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lssl.networks.heads import Projector, TapHeads
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
