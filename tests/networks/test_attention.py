"""Conditional attention against a plain loop over queries and heads, in float64; decoder layers against torch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lssl.networks.attention import ConditionalAttention, DecoderLayer


@pytest.mark.parametrize("residual", [False, True])
def test_attention_is_the_written_formula(residual: bool):
    torch.manual_seed(0)
    attention = ConditionalAttention(6, heads=3, last=nn.Linear(6, 4), residual=residual).double()
    query, rows = torch.randn(2, 5, 6).double(), torch.randn(2, 7, 6).double()
    found = attention(query, rows)
    assert found.shape == (2, 5, 4)
    keys, values = (rows @ weight.T for weight in attention.key_value.weight.chunk(2))
    for b in range(2):
        for k in range(5):
            parts = []
            for head in (slice(0, 2), slice(2, 4), slice(4, 6)):
                weights = [math.exp(float(query[b, k, head] @ keys[b, n, head]) / math.sqrt(2)) for n in range(7)]
                parts.append(sum(w * values[b, n, head] for n, w in enumerate(weights)) / sum(weights))
            mixed = attention.out(torch.cat(parts))
            expected = attention.last(attention.zeta(query[b, k] + mixed if residual else mixed))
            torch.testing.assert_close(found[b, k], expected)


def test_decoder_layer_is_torchs():
    torch.manual_seed(0)
    layer, torchs = DecoderLayer(6, 3), nn.TransformerDecoderLayer(6, 3, 24, 0.0, "gelu", 1e-5, True, True)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    torchs.load_state_dict(layer.state_dict())
    rows, memory = (torch.randn(2, n, 6).requires_grad_() for n in (5, 7))
    outputs = [module(rows, memory) for module in (layer, torchs)]
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(output.square().sum(), (rows, memory)) for output in outputs]
    torch.testing.assert_close(*gradients)
