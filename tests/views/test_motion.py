"""Tissue that moves between visits: views, points and lattices follow it.

A rigid motion of tissue within the frame is the same as another frame of the second visit, so all that follows a field
must equal what the frame alone gives there. Trilinear interpolation of a linear field is exact.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from moving import PHI, drawn, motion_over
from torch.testing import assert_close

from lssl.correspondence.matchers import FrameMatcher
from lssl.data.batch import Visit, collate
from lssl.data.motion import with_motion
from lssl.datamodules import PhantomDataModule
from lssl.networks.feature_geometry import Tap
from lssl.utils.errors import InputError
from lssl.utils.random import seeded
from lssl.views import geometry as geo
from lssl.views.alignment import align_views, bring
from lssl.views.points import plan_points, sampling_grids
from lssl.views.sampler import ViewSampler

TAPS = [Tap("", 3, (4, 2, 1), (1.5, 0.5, 0.0)), Tap("", 3, (2, 2, 2), (0.5, 0.5, 0.5))]


@pytest.fixture(scope="module")
def views(make_batch):
    """As the frame has them, and the same with motion."""
    batch = make_batch(3, (40, 36, 32), image="frame")
    batch.foreground = torch.rand(batch.foreground.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    # All are turned, so that no feature lies between two voxels, where rounding decides
    return drawn(batch, ViewSampler((16, 12, 8), transforms=[], overlap=0.4, affine_probability=1.0))


def test_a_point_is_followed_there_and_back(views):
    _, (first, second) = views
    points = geo.transform(first.affine, geo.lattice((16, 12, 8)).expand(3, -1, -1))
    there = first.follow(points)
    assert_close(there, geo.transform(PHI.expand(3, 4, 4), points), rtol=0, atol=1e-4)
    assert (there - points).norm(dim=-1).max() > 2
    shown = second.contains(there)
    assert shown.float().mean() > 0.3
    assert_close(second.follow(there)[shown], points[shown], rtol=0, atol=1e-4)
    np.testing.assert_allclose(first.host.follow(points.numpy()), there.numpy(), atol=1e-9)
    found, score = FrameMatcher().match(points, first, second)
    assert_close(found, there)
    on_host = FrameMatcher().match_on_host(points.numpy(), first.host, second.host)
    np.testing.assert_allclose(on_host[0], there.numpy(), atol=1e-9)
    np.testing.assert_array_equal(on_host[1], score.numpy())


@pytest.mark.parametrize("foreground", [False, True])
@pytest.mark.parametrize("count", [12, 150])  # 150: some look at further candidates
def test_points_lie_where_their_tissue_is(views, count, foreground):
    found = []
    for first, second in views:
        planned = plan_points(first.host, second.host, TAPS, count, seeded(3), foreground, both_ways=True)
        grids = sampling_grids((first.host, second.host), TAPS * 2, planned.places)
        found.append((planned.index, planned.weight, grids))
    (index, weight, grid), (moved_index, moved_weight, moved_grid) = found
    assert weight.all()
    np.testing.assert_array_equal(moved_index, index)
    np.testing.assert_array_equal(moved_weight, weight)
    np.testing.assert_allclose(moved_grid, grid, atol=1e-5)
    still = [dataclasses.replace(view, motion=None) for view in views[1]]
    assert (plan_points(*(v.host for v in still), TAPS, count, seeded(3), foreground, True).index != index).any()


@pytest.mark.parametrize("foreground", [False, True])
def test_lattices_are_aligned_where_their_tissue_is(views, foreground):
    lattices = [align_views(*pair, TAPS[1:2], [(8, 6, 4)], foreground=foreground) for pair in views]
    expected, found = lattices
    assert 0.1 < expected.valid.float().mean() < 0.95
    assert (found.valid == expected.valid).all()
    maps = torch.rand(6, 2, 8, 6, 4)
    assert_close(found.of_other([maps]), expected.of_other([maps]), rtol=0, atol=1e-4)
    still = align_views(*(dataclasses.replace(view, motion=None) for view in views[1]), TAPS[1:2], [(8, 6, 4)])
    assert (still.of_other([maps]) - expected.of_other([maps])).abs().max() > 0.05


def test_voxels_are_brought_where_their_tissue_is(views):
    maps = torch.rand(3, 2, 16, 12, 8)
    (expected, valid), (found, seen) = (bring(maps, second, first) for first, second in views)
    assert (seen == valid).all()
    assert 0.1 < valid.float().mean() < 0.95
    inside = valid[:, None].expand_as(found)
    assert_close(found[inside], expected[inside], rtol=0, atol=1e-4)


def test_a_visit_with_itself_or_a_stranger_does_not_move(make_batch):
    batch = make_batch(2)
    batch.motion, batch.motion_affine = motion_over(batch.affines, batch.size)
    swapped = batch.visits(torch.tensor([[1, 0], [0, 0]]))
    assert_close(swapped.motion[0], batch.motion[0].flip(0))
    assert_close(swapped.motion_affine[0], batch.motion_affine[0].flip(0))
    assert not swapped.motion[1].any()
    crossed = batch.visits(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0, 1], [1, 1]]))
    assert not crossed.motion[0].any()
    assert_close(crossed.motion[1], batch.motion[1])
    for moved in (swapped, crossed):
        np.testing.assert_array_equal(moved.host.motion, moved.motion.numpy())
        np.testing.assert_array_equal(batch.host.visits(np.array([[1, 0], [0, 0]])).motion, swapped.motion.numpy())


def moved(points: np.ndarray, row: int, other: int) -> np.ndarray:
    """Tissue widens by 10 % a visit."""
    return points * 1.1 ** (other - row)


def visit(size: tuple[int, int, int], session: int, corner: float) -> Visit:
    affine = torch.diag(torch.tensor([1.0, 2.0, 5.0, 1.0], dtype=torch.float64))
    affine[:3, 3] = corner
    return Visit(torch.rand(1, *size), affine, torch.ones(size, dtype=torch.bool), session=session)


def test_knots_cover_the_box_and_both_visits_move_towards_each_other():
    pairs = [with_motion((visit(size, 5, -7.0), visit(size, 6, -4.0)), moved) for size in ((20, 11, 4), (9, 12, 5))]
    assert pairs[0][0].motion.shape == (3, 6, 6, 4)  # every 4th, 2nd and 1st voxel, and beyond the last
    batch = collate(pairs)
    assert batch.motion.shape == (2, 2, 3, 6, 7, 5)
    for number, factor in ((0, 1.1), (1, 1 / 1.1)):
        for row, pair in enumerate(pairs):
            size = pair[number].image.shape[1:]
            points = geo.transform(pair[number].affine[None], geo.lattice(size)[None])
            shift = geo.sample(batch.motion[row : row + 1, number], batch.motion_affine[row : row + 1, number], points)
            assert_close(points + shift, points * factor, rtol=0, atol=1e-5)


def test_a_visit_paired_with_itself_has_no_knots_to_compute():
    one = visit((9, 9, 9), 5, 0.0)
    first, second = with_motion((one, one), None)
    assert first.motion.shape == second.motion.shape == (3, 1, 1, 1)
    assert not first.motion.any()


def test_batches_of_a_phantom_follow_its_truth():
    data = PhantomDataModule(
        subjects=2, visits=2, interval=8.0, size=32, spacing=6.0, batch_size=2, split=(1.0, 0.0, 0.0)
    )
    data.setup()
    data.use_motion()
    batch = next(iter(data.train_dataloader()))
    first, second = ViewSampler(16, correspondence="field")(batch, torch.Generator().manual_seed(0))
    points = geo.transform(first.affine, geo.lattice((16, 16, 16)).expand(2, -1, -1))
    found, _ = FrameMatcher().match(points, first, second)
    for row in range(2):
        truth = data.correspond(points[row], *batch.session[row].tolist())
        inside = first.contains(points[row : row + 1].expand(2, -1, -1), foreground=True)[row] & truth.isfinite().all(1)
        miss = [(each[row] - truth)[inside].norm(dim=1).mean() for each in (found, points)]
        assert miss[0] < 0.1 * miss[1]
        assert miss[1] > 0.2


def test_what_does_not_know_how_tissue_moves_says_so(make_batch):
    with pytest.raises(InputError, match="does not tell how tissue moves"):
        ViewSampler(16, correspondence="field")(make_batch(), torch.Generator())
    rigid = ViewSampler(8)
    batch = make_batch()
    batch.motion, batch.motion_affine = motion_over(batch.affines, batch.size)
    first, _ = rigid(batch, torch.Generator().manual_seed(0))
    assert first.motion is None
    assert first.host.motion is None
