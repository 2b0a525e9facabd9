import math

import torch

from lssl.metrics import LandmarkError


def test_distances_by_hand_over_several_updates():
    error = LandmarkError()
    places = torch.tensor([[[3.0, 4.0, 0.0], [1.0, 2.0, 2.0]], [[0.0, 0.0, 9.0], [100.0, 0.0, 0.0]]])  # 5, 3, 9, 100
    error.update(places, torch.zeros(2, 2, 3), torch.tensor([[True, True], [True, False]]))
    result = error.compute()
    assert result["median"].item() == 5
    assert math.isclose(result["mean"].item(), 17 / 3)
    error.update(torch.tensor([7.0, 0, 0]), torch.zeros(3))
    result = error.compute()
    assert result["median"].item() == 6  # of 3, 5, 7, 9
    assert result["mean"].item() == 6


def test_nothing_gives_nan():
    error = LandmarkError()
    assert all(math.isnan(value) for value in error.compute().values())
    error.update(torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.bool))
    assert all(math.isnan(value) for value in error.compute().values())


def test_far_from_the_origin_in_float64():
    error = LandmarkError()
    far = torch.full((1, 3), 1e6, dtype=torch.float64)
    error.update(far + 0.01, far)
    assert math.isclose(error.compute()["median"].item(), 0.01 * math.sqrt(3), rel_tol=1e-6)
