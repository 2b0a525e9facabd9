"""Pictures show what they say: sides, planes, and both visits."""

from __future__ import annotations

import matplotlib.image as mpl_image
import numpy as np
import pytest

from lssl.prepare.picture import checkerboard, draw_subject, planes


def test_planes_in_radiological_convention():
    """A voxel to the right, in front and above the middle, in canonical axes (right, anterior, superior)."""
    volume = np.zeros((11, 13, 15))
    volume[9, 10, 12] = 1
    axial, coronal, sagittal = planes(volume, (9, 10, 12))
    assert (axial.shape, coronal.shape, sagittal.shape) == ((13, 11), (15, 11), (15, 13))
    assert np.argwhere(axial).tolist() == [[2, 1]]  # front is up, the patient's right on the left
    assert np.argwhere(coronal).tolist() == [[2, 1]]  # top is up, right on the left
    assert np.argwhere(sagittal).tolist() == [[2, 2]]  # top is up, front on the left


def test_checkerboards_hold_half_of_each():
    board = checkerboard(np.zeros((8, 8)), np.ones((8, 8)), 2)
    assert board.sum() == 32
    assert board[0, :6].tolist() == [0, 0, 1, 1, 0, 0]
    assert board[2, :4].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("visits", [1, 2, 4])
def test_a_picture_is_written_for_any_number_of_visits(visits, tmp_path):
    images = [np.random.default_rng(visit).random((20, 22, 24)) for visit in range(visits)]
    names = [f"ses-{visit}" for visit in range(visits)]
    draw_subject(tmp_path / "a.png", "sub-a", names, (images, 2.0), (images, 2.0), [""] * visits)
    assert mpl_image.imread(tmp_path / "a.png").shape[1] == (540 if visits == 1 else 1080)


def test_an_empty_image_is_drawn_too(tmp_path):
    empty = [np.zeros((8, 8, 8))] * 2
    draw_subject(tmp_path / "a.png", "sub-a", ["one", "two"], (empty, 2.0), (empty, 2.0), ["", ""])
    assert (tmp_path / "a.png").is_file()
