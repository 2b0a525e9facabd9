"""The volume that two boxes share, against closed forms and counted points."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lssl.views import geometry as geo
from lssl.views import overlap

SIZE = (12, 10, 8)
MIDDLE = (torch.tensor(SIZE, dtype=torch.float64) - 1) / 2


def shared_volume(maps: Tensor, size: tuple[int, int, int]) -> Tensor:
    return torch.as_tensor(overlap.shared_volume(maps.numpy(), size))


def random_maps(count: int, seed: int = 0, shift: float = 0.5, angle: float = 0.6) -> Tensor:
    draw = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 3, generator=draw, dtype=torch.float64)

    linear = geo.rotation(uniform(-angle, angle)) @ geo.scaling(uniform(0.7, 1.4) * uniform(-1, 1).sign())
    return geo.translation(uniform(-shift, shift) * (MIDDLE + 0.5)) @ geo.about(linear, MIDDLE)


def counted(maps: Tensor, points: int = 100) -> Tensor:
    """On a dense lattice of the box."""
    cell = torch.tensor(SIZE, dtype=torch.float64) / points
    lattice = (geo.lattice((points,) * 3) + 0.5) * cell - 0.5
    inside = [geo.contains(geo.transform(torch.linalg.inv(each), lattice), SIZE, -0.5) for each in maps]
    return torch.stack([each.double().mean() for each in inside]) * math.prod(SIZE)


def test_random_boxes_against_counted_points():
    maps = random_maps(12)
    torch.testing.assert_close(shared_volume(maps, SIZE), counted(maps), rtol=5e-3, atol=0)


@pytest.mark.parametrize("angles", [(0, 0, 0.3), (0.2, 0, 0), (math.pi / 4, 0, 0), (math.pi / 2, 0, 0)])
def test_boxes_that_share_planes_and_edges(angles: tuple):
    """Turned about one axis, faces stay coincident; the planes must not be counted twice."""
    turn = geo.about(geo.rotation(torch.tensor([angles], dtype=torch.float64)), MIDDLE)
    torch.testing.assert_close(shared_volume(turn, SIZE), counted(turn), rtol=5e-3, atol=0)


def test_boxes_along_the_axes_in_closed_form():
    shifts = torch.tensor(
        list(itertools.product((-12.5, -3, 0, 2.5, 4), (0, 1e-7, 6), (0, -7.25))), dtype=torch.float64
    )
    expected = (torch.tensor(SIZE) - shifts.abs()).clamp_min(0).prod(1)
    found = shared_volume(geo.translation(shifts), SIZE)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    twice = geo.about(geo.scaling(torch.tensor([[2.0, 0.5, -1.0]], dtype=torch.float64)), MIDDLE)
    assert shared_volume(twice, SIZE).item() == pytest.approx(math.prod(SIZE) / 2, rel=1e-6)


def test_it_is_continuous_where_planes_become_parallel():
    """The volume of two nearly equal boxes, whatever the angle between them, to first order their own."""
    for angle in torch.logspace(-12, -3, 40, dtype=torch.float64):
        turn = geo.about(geo.rotation(angle * torch.tensor([[1.0, 0.7, -0.4]], dtype=torch.float64)), MIDDLE)
        lost = 1 - shared_volume(turn, SIZE).item() / math.prod(SIZE)
        assert -1e-9 <= lost < angle + 1e-5
    inside = geo.about(geo.rotation(torch.tensor([[1e-7, 0, 0]], dtype=torch.float64)), MIDDLE) @ geo.translation(
        torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64)
    )
    assert shared_volume(inside, SIZE).item() == pytest.approx(11.5 * 80, rel=1e-5)


def test_symmetric_in_the_two_boxes():
    maps = random_maps(200, seed=1, shift=3.0)
    back = shared_volume(torch.linalg.inv(maps), SIZE) * geo.volume(maps)
    found = shared_volume(maps, SIZE)
    torch.testing.assert_close(found, back, rtol=1e-6, atol=1e-3)
    assert (found == 0).any()
    assert (
        found <= torch.minimum(geo.volume(maps), torch.ones(200, dtype=torch.float64)) * math.prod(SIZE) + 1e-6
    ).all()
