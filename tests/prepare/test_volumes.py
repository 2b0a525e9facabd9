"""Resampling: the right place to a tenth of a voxel, in the right direction, once."""

from __future__ import annotations

import numpy as np
import pytest
from scans import rigid, scan

from lssl.prepare.quality import laplacian_energy
from lssl.prepare.transforms import half_way
from lssl.prepare.volumes import (
    FrameGrid,
    Volume,
    common_grid,
    resample,
    resample_label,
    resample_mask,
    thick,
    to_itk,
    to_itk_map,
)

AFFINE = np.array([[2.0, 0, 0, -30], [0, 1.5, 0, 12], [0, 0, 3.0, -7], [0, 0, 0, 1]])
SHAPE = (30, 34, 22)


def coordinates(affine: np.ndarray, shape=SHAPE) -> np.ndarray:
    index = np.stack(np.meshgrid(*[np.arange(length) for length in shape], indexing="ij"), -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def test_itk_sees_the_same_places():
    """A voxel's place in ITK's LPS is its place in RAS with x and y negated."""
    image = to_itk(np.random.default_rng(0).random(SHAPE).astype(np.float32), AFFINE)
    assert image.GetSize() == SHAPE
    place = AFFINE @ [3, 5, 7, 1]
    assert image.TransformIndexToPhysicalPoint((3, 5, 7)) == pytest.approx([-place[0], -place[1], place[2]])
    motion = rigid(20, 12)
    moved = motion @ [10, -20, 30, 1]
    assert to_itk_map(motion).TransformPoint((-10, 20, 30)) == pytest.approx([-moved[0], -moved[1], moved[2]])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_ramp_is_read_where_it_lies(axis):
    """Voxel by voxel, value = place: any shift by half a voxel, flip or inverted map shows."""
    ramp = coordinates(AFFINE)[..., axis].astype(np.float32)
    motion = rigid(8, 3)
    grid = FrameGrid((5, 6, 7), 1.7, (-10.0, 25.0, 10.0))
    found = resample(Volume(ramp, AFFINE, np.ones(SHAPE, bool)), grid, motion)
    wanted = coordinates(grid.affine, grid.size) @ motion[:3, :3].T + motion[:3, 3]
    np.testing.assert_allclose(found, wanted[..., axis], atol=0.02)


def test_splines_do_not_overshoot():
    image = np.zeros(SHAPE, np.float32)
    image[10:20, 10:20, 5:15] = 100
    found = resample(Volume(image, AFFINE, image > 0), FrameGrid((40, 40, 40), 1.3, (-25.0, 15.0, -5.0)), np.eye(4))
    assert found.min() == 0
    assert found.max() == 100


def test_the_grid_holds_the_foreground_of_all_visits():
    volumes = [scan(), scan(rigid(10, 15))]
    maps = half_way(2, {(0, 1): rigid(10, 15)})
    grid = common_grid(volumes, maps, 3.0, 6.0)
    for volume, matrix in zip(volumes, maps, strict=True):
        mask = resample_mask(volume.foreground, volume.affine, grid, matrix)
        assert mask.sum() * 27 == pytest.approx(volume.foreground.sum() * 64, rel=0.03)
        edge = mask.copy()
        edge[1:-1, 1:-1, 1:-1] = False
        assert not edge.any()


def test_labels_keep_their_classes_and_volumes():
    label = np.zeros(SHAPE, np.int16)
    label[5:20, 8:25, 4:18] = 3
    label[10:15, 12:20, 8:14] = 17
    motion = rigid(6, 4)
    grid = FrameGrid((70, 60, 75), 1.2, (-45.0, 0.0, -20.0))
    found = resample_label(label, AFFINE, grid, motion)
    assert set(np.unique(found)) == {0, 3, 17}  # nothing between 3 and 17
    for value in (3, 17):
        assert (found == value).sum() * 1.2**3 == pytest.approx((label == value).sum() * 9.0, rel=0.04)
    place = coordinates(grid.affine, grid.size)[found == 17].mean(0)
    wanted = np.linalg.inv(motion) @ [*coordinates(AFFINE)[label == 17].mean(0), 1]
    np.testing.assert_allclose(place, wanted[:3], atol=0.4)  # half a voxel is 0.75 mm and more


def test_labels_as_masks_of_one_class():
    label = (scan().foreground * 4).astype(np.int16)
    grid = FrameGrid((48, 48, 48), 4.0, (-95.0, -97.0, -94.5))
    mask = resample_mask(label > 0, scan().affine, grid, rigid(5, 3))
    found = resample_label(label, scan().affine, grid, rigid(5, 3)) == 4
    assert (found != mask).mean() < 1e-3


def test_both_visits_are_equally_smooth_in_the_half_way_frame():
    """White noise shows how an interpolation blurs. In the frame of the first visit only the second is blurred."""
    motion, draw = rigid(7, 9), np.random.default_rng(0)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = -96
    noise = [draw.standard_normal((96, 96, 96)).astype(np.float32) for _ in range(2)]
    volumes = [Volume(image, affine, np.ones(image.shape, bool)) for image in noise]
    energy = {}
    for name, maps in (("half-way", half_way(2, {(0, 1): motion})), ("first", [np.eye(4), motion])):
        grid = common_grid(volumes, maps, 2.0, 0.0)
        if name == "first":  # on the first visit's own voxels
            grid = FrameGrid((96, 96, 96), 2.0, (-96.0, -96.0, -96.0))
        images = [resample(volume, grid, matrix) for volume, matrix in zip(volumes, maps, strict=True)]
        inside = np.linalg.norm(coordinates(grid.affine, grid.size) / (70, 85, 70), axis=-1) < 0.7
        energy[name] = [laplacian_energy(image, inside) for image in images]
    assert abs(energy["half-way"][0] / energy["half-way"][1] - 1) < 0.02
    assert abs(energy["first"][0] / energy["first"][1] - 1) > 0.03


def test_coarser_grids_average():
    """Noise sampled on every fourth voxel would keep its power."""
    noise = np.random.default_rng(0).standard_normal((64, 64, 64)).astype(np.float32)
    found = resample(
        Volume(noise, np.eye(4), np.ones((64, 64, 64), bool)), FrameGrid((14, 14, 14), 4.0, (5.0, 5.0, 5.0)), np.eye(4)
    )
    assert found.std() < 0.3


def test_thick_slices_are_interpolated_linearly():
    """A step between 4 mm slices: a spline undershoots before it, a straight line does not."""
    voxels = np.zeros((8, 8, 12), np.float32)
    voxels[..., 6:] = 100
    voxels[..., 0] = -50  # so that cutting at the extremes hides nothing
    affine = np.diag([1.0, 1.0, 4.0, 1.0])
    volume = Volume(voxels, affine, np.ones(voxels.shape, bool))
    grid = FrameGrid((8, 8, 41), 1.0, (0.0, 0.0, 0.0))
    assert thick([volume], 1.0)
    assert not thick([volume], 2.0)
    profiles = {}
    for volume.linear in (False, True):
        profiles[volume.linear] = resample(volume, grid, np.eye(4))[4, 4, 8:]
    assert profiles[False].min() < -3
    np.testing.assert_allclose(profiles[True], np.interp(np.arange(8, 41), 4 * np.arange(12), voxels[4, 4]), atol=1e-3)
