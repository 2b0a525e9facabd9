"""Weights by interval."""

import math

import torch

from lssl.utils.intervals import interval_weight


def test_weights_fall_with_the_interval_whatever_its_sign_and_are_zero_where_it_is_unknown():
    first = torch.tensor([0.0, 0.0, 3.0, float("nan"), 2.0])
    second = torch.tensor([0.0, 1.0, 1.0, 1.0, float("nan")])
    expected = torch.tensor([1.0, math.exp(-2), math.exp(-4), 0.0, 0.0])
    torch.testing.assert_close(interval_weight(first, second, 0.5), expected)
