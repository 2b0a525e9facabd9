"""Weights by interval."""

import math

import pandas as pd
import pytest
import torch

from lssl.utils.errors import InputError
from lssl.utils.intervals import interval_weight, require_intervals


def test_weights_fall_with_the_interval_whatever_its_sign_and_are_zero_where_it_is_unknown():
    first = torch.tensor([0.0, 0.0, 3.0, float("nan"), 2.0])
    second = torch.tensor([0.0, 1.0, 1.0, 1.0, float("nan")])
    expected = torch.tensor([1.0, math.exp(-2), math.exp(-4), 0.0, 0.0])
    torch.testing.assert_close(interval_weight(first, second, 0.5), expected)


@pytest.mark.parametrize(
    ("times", "refused"),
    [([0, 1, 0], False), ([0, float("nan"), 0], True), ([float("nan")] * 2 + [0], True), ([0], False)],
)
def test_weights_by_interval_need_a_known_interval(times, refused):
    visits = pd.DataFrame({"subject": ["a", "a", "b"][: len(times)], "time": times})
    if refused:
        with pytest.raises(InputError, match="of no subject are two visits known in time"):
            require_intervals(visits)
    else:
        require_intervals(visits)
