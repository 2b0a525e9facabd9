"""Pictures show what they say: planes, edges, and what differs."""

from __future__ import annotations

import matplotlib.image as mpl_image
import numpy as np
import pytest
from scipy import ndimage

from lssl.prepare.looks import SAME_CONTRAST, difference, look_at
from lssl.prepare.picture import Look, draw_subject, draw_visit, edges, middle
from lssl.prepare.volumes import FrameGrid, Volume, slices
from lssl.utils.canvas import planes


def test_planes_in_radiological_convention():
    """A voxel to the right, in front and above the middle, in canonical axes (right, anterior, superior)."""
    volume = np.zeros((11, 13, 15))
    volume[9, 10, 12] = 1
    axial, coronal, sagittal = planes(volume, (9, 10, 12))
    assert (axial.shape, coronal.shape, sagittal.shape) == ((13, 11), (15, 11), (15, 13))
    assert np.argwhere(axial).tolist() == [[2, 1]]  # front is up, the patient's right on the left
    assert np.argwhere(coronal).tolist() == [[2, 1]]  # top is up, right on the left
    assert np.argwhere(sagittal).tolist() == [[2, 2]]  # top is up, front on the left


def test_slices_of_a_moved_visit_show_the_places_of_the_frame():
    """An image of three channels in turn: its own coordinates in mm, on anisotropic voxels; the map is a shift."""
    affine = np.diag([1.5, 1.0, 2.0, 1.0])
    affine[:3, 3] = (-12.0, -10.0, -16.0)
    shift = np.eye(4)
    shift[:3, 3] = (2.0, -1.5, 3.0)
    grid, place, spacing = FrameGrid((6, 7, 5), 2.0, (-6.0, -5.0, -4.0)), np.array([1.0, 0.5, -1.0]), 0.5
    index = np.stack(np.meshgrid(*map(np.arange, (17, 21, 17)), indexing="ij"), -1)
    mm = index @ affine[:3, :3].T + affine[:3, 3]
    start, across, up = np.array(grid.origin), (0, 0, 1), (1, 2, 2)
    for axis in range(3):
        volume = Volume(mm[..., axis].astype(np.float32), affine, np.ones((17, 21, 17), bool))
        for plane, image in enumerate(slices(volume, shift, place, grid, spacing)):
            expected = place + shift[:3, 3]
            rows = start[up[plane]] + shift[up[plane], 3] + spacing * np.arange(image.shape[0])[::-1]
            columns = start[across[plane]] + shift[across[plane], 3] + spacing * np.arange(image.shape[1])[::-1]
            value = {up[plane]: rows[:, None], across[plane]: columns[None]}.get(axis, expected[axis])
            assert image == pytest.approx(np.broadcast_to(value, image.shape), abs=1e-4)


def disc(radius: float, centre: float = 32.0) -> np.ndarray:
    rows, columns = np.indices((64, 64))
    return (np.hypot(rows - centre, columns - centre) < radius).astype(float)


def test_edges_lie_on_the_border_whatever_is_bright():
    image = ndimage.gaussian_filter(0.8 * disc(20) + 0.1, 1)
    found = edges(image, 1.0)
    rows, columns = np.nonzero(found)
    assert np.abs(np.hypot(rows - 32, columns - 32) - 20).max() < 1.5
    assert len(rows) > 2 * np.pi * 20 * 0.8
    assert edges(0.95 - image, 1.0).sum() == pytest.approx(found.sum(), rel=0.1)
    assert not edges(np.full((16, 16), 0.5), 1.0).any()


def brain() -> list[np.ndarray]:
    """Slices of a head with tissues of three intensities and a bias field."""
    tissue = ndimage.gaussian_filter(0.9 * disc(28) - 0.3 * disc(15) - 0.25 * disc(6), 1.5)
    return [tissue * (0.8 + 0.4 * np.linspace(0, 1, 64))] * 3


def test_a_difference_is_what_has_changed_and_not_the_scanner():
    first = brain()
    other = [0.7 * image.clip(0) ** 1.3 for image in first]  # another brightness and gamma
    other[0] = np.where(disc(4, 22) > 0, 0.15, other[0])
    axial, coronal, _ = difference(other, first)
    assert np.abs(coronal).max() < 0.05
    assert (np.abs(axial) > 0.2)[disc(3, 22) > 0].all()
    assert np.abs(axial[disc(5, 22) == 0]).max() < 0.1
    assert (axial[disc(30) == 0] == 0).all()


def test_another_contrast_has_no_difference():
    first = brain()
    other = [0.9 * disc(28) - 0.1 * disc(15) - 0.7 * disc(6) - 0.5 * disc(26) + 0.6 * disc(20) for _ in first]
    assert difference(other, first) == []
    assert difference([image * 0 for image in first], first) == []
    assert 0.5 < SAME_CONTRAST < 0.88  # what was measured


def test_a_place_is_shown_before_where_the_first_visit_has_it():
    """A bright ball; the second visit is shifted by 8 mm in scanner coordinates. Registered, both are in one place."""
    index = np.indices((24, 24, 24))
    ball = 1 + 5.0 * (((index - 12) ** 2).sum(0) < 16)
    affine, moved = np.diag([2.0, 2, 2, 1]), np.diag([2.0, 2, 2, 1])
    moved[0, 3] = 8.0
    head = np.ones(ball.shape, bool)
    visits = [Volume(ball.astype(np.float32), at, head) for at in (affine, moved)]
    maps = [np.eye(4), np.eye(4)]  # the frame is half way
    maps[0][0, 3], maps[1][0, 3] = -4.0, 4.0
    grid = FrameGrid((24, 24, 24), 2.0, (0.0, 0.0, 0.0))
    spacing, (one, two) = look_at(visits, maps, (grid, grid), np.array([28.0, 24, 24, 1]), ["a", "b"], ["", ""])
    assert spacing == 2.0
    assert one.after[0] == pytest.approx(two.after[0], abs=1e-4)
    sizes = [(image > image.max() / 2).sum() for image in (one.after[2], one.before[2])]
    assert sizes[0] == sizes[1]  # the sagittal slices cut the middle of the ball
    bright = [np.argwhere(look.before[0] > look.before[0].max() / 2).mean(0) for look in (one, two)]
    assert bright[0] - bright[1] == pytest.approx([0, 4], abs=0.3)  # 8 mm to the patient's right is to the left


@pytest.mark.parametrize("visits", [1, 2, 9])
def test_a_picture_is_written_for_any_number_of_visits(visits, tmp_path):
    looks = [Look(f"ses-{visit}", brain(), brain(), brain() if visit % 2 else []) for visit in range(visits)]
    draw_subject(tmp_path / "a.png", "sub-a", looks, 1.0)
    assert mpl_image.imread(tmp_path / "a.png").shape[1] == (660 if visits == 1 else 1980)


def test_an_empty_image_is_drawn_too(tmp_path):
    empty = [np.zeros((8, 8))] * 3
    looks = [Look(name, empty, empty, difference(empty, empty)) for name in ("one", "two")]
    draw_subject(tmp_path / "a.png", "sub-a", looks, 2.0)
    draw_visit(tmp_path / "a.jpg", looks[0], 2.0)
    assert (tmp_path / "a.png").is_file()
    assert (tmp_path / "a.jpg").read_bytes()[:2] == b"\xff\xd8"
    assert middle(np.zeros((8, 8, 8)), 2.0) == (4, 4, 4)
