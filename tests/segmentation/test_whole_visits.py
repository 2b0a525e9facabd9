"""Whole visits: grids of one box, windows, and the way back, on images whose answer is known."""

import pytest
import torch

from lssl.segmentation.volumes import segment, working_grid
from lssl.views import geometry as geo


@pytest.mark.parametrize("own", [(1.0, 1.0, 1.0), (1.5, 0.8, 3.0)])
def test_both_grids_fill_one_box(own):
    size, own = (30, 21, 12), torch.tensor(own, dtype=torch.float64)
    wanted = torch.tensor([2.0, 2.0, 2.0], dtype=torch.float64)
    new, matrix = working_grid(size, own, wanted)
    corners = geo.transform(matrix, torch.tensor([[-0.5] * 3, [n - 0.5 for n in new]], dtype=torch.float64))
    slack = (torch.tensor(new) * wanted - torch.tensor(size) * own) / 2 / own  # less than half a new voxel
    torch.testing.assert_close(corners[0], -0.5 - slack)
    torch.testing.assert_close(corners[1], torch.tensor(size) - 0.5 + slack)
    assert (slack >= 0).all()
    assert (slack * own < wanted / 2).all()


def thresholds(image):
    """A 'network' without weights: class = how many of four thresholds a voxel passes, as probabilities."""
    number = (image * 5).long().clamp(0, 4)
    return torch.nn.functional.one_hot(number[:, 0], 5).movedim(-1, 1).float()


def test_on_the_networks_own_spacing_it_is_the_network(generator):
    image = torch.rand(1, 21, 19, 23, generator=generator)
    own = torch.tensor([2.0, 2.0, 2.0])
    found = segment(image, own, own * 1.005, thresholds, (16, 16, 16))
    assert torch.equal(found, thresholds(image[None])[0].argmax(0))


@pytest.mark.parametrize("own", [(1.0, 1.0, 1.0), (1.5, 2.5, 3.0), (3.0, 3.0, 3.0)])
def test_labels_lie_where_the_image_is(own):
    """A ball off the centre: Dice on its own grid, and its centre to a tenth of a voxel."""
    own = torch.tensor(own, dtype=torch.float64)
    size = [round(60 / step) for step in own.tolist()]
    places = geo.lattice(size).unflatten(0, size) * own + own / 2
    middle = torch.tensor([22.0, 33.0, 38.0], dtype=torch.float64)
    ball = (places - middle).norm(dim=-1) < 14
    found = segment(
        ball[None].float() * 0.9, own, torch.full((3,), 2.0), lambda x: thresholds(x / 0.9 * 0.3), (16,) * 3
    )
    found = found > 0  # the share of a voxel that is ball, above two thirds
    dice = 2 * (found & ball).sum() / (found.sum() + ball.sum())
    assert dice > 0.88
    shift = (places[found].mean(0) - places[ball].mean(0)).abs() / own
    assert shift.max() < 0.15


def test_coarser_voxels_are_means_of_finer_ones():
    """Sampling one voxel in two would take all or nothing of a pattern that alternates."""
    image = (torch.arange(24) % 2).float().view(1, 24, 1, 1).expand(1, 24, 24, 24)
    seen = []

    def watch(x):
        seen.append(x)
        return thresholds(x)

    segment(image, torch.ones(3), torch.full((3,), 2.0), watch, (12, 12, 12))
    assert seen[0].shape[-1] == 12
    torch.testing.assert_close(seen[0], torch.full_like(seen[0], 0.5))


def test_many_classes_come_back_in_parts():
    """More classes than are brought back at a time, in stripes."""
    stripes = torch.arange(20).repeat_interleave(2).view(1, 40, 1, 1).expand(1, 40, 20, 20).float()

    def one_hot(x):
        return torch.nn.functional.one_hot(x[:, 0].round().long().clamp(0, 19), 20).movedim(-1, 1).float()

    found = segment(stripes, torch.ones(3), torch.tensor([1.0, 2.0, 1.0]), one_hot, (40, 16, 16))
    assert torch.equal(found, stripes[0].long())
