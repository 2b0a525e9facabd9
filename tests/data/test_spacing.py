"""The working spacing: whose headers decide, and the boxes that are read for it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lssl.data.spacing import BoxReader, median_spacing, refuse_large_views, spacing_sentence, voxels_per_step
from lssl.utils.errors import InputError

SIZES = np.array([[0.8, 0.8, 5.0]] * 3 + [[3.0, 3.0, 3.0]] * 2 + [[1.0, 1.0, 1.0]] * 4)


def test_training_visits_alone_decide():
    train = np.array([True] * 5 + [False] * 4)
    np.testing.assert_array_equal(median_spacing(SIZES, train), [0.8, 0.8, 5.0])
    np.testing.assert_array_equal(median_spacing(SIZES, ~train), [1.0, 1.0, 1.0])
    np.testing.assert_array_equal(median_spacing(SIZES, np.zeros(9, bool)), [1.0, 1.0, 3.0])  # none to train on


def test_a_percent_is_no_difference():
    steps = voxels_per_step(np.array([[1.0, 1.009, 0.98], [2.0, 1.0, 0.5]]), [1.0, 1.0, 1.0])
    np.testing.assert_array_equal(steps, [[1.0, 1.0, 1 / 0.98], [0.5, 1.0, 2.0]])


def test_the_sentence_counts_visits_by_voxel_size():
    text = spacing_sentence(SIZES, [0.8, 0.8, 5.0], "the median of the training visits")
    assert text == (
        "Voxel sizes of 9 visits: 4 of 1×1×1 mm, 3 of 0.8×0.8×5 mm, 2 of 3×3×3 mm; all views have the working "
        "spacing 0.8×0.8×5 mm (the median of the training visits; views.spacing sets another)."
    )
    assert spacing_sentence(SIZES, [0.8, 0.8, 5.0], "views.spacing").endswith("mm (views.spacing).")
    assert spacing_sentence(SIZES[:3], [0.8, 0.8, 5.0], "") == ""


def test_boxes_cover_the_same_millimetres():
    asked = []
    steps = voxels_per_step(np.array([[0.8, 0.8, 5.0], [3.0, 3.0, 3.0], [2.0, 2.0, 2.0]]), [2.0, 2.0, 2.0])
    read = BoxReader(lambda rows, size, seed: asked.append(size) or ("one", "other"), steps)  # type: ignore[arg-type, func-returns-value]
    for row in range(3):
        read((row, row), (40, 40, 40), 0)
    assert asked == [(100, 100, 16), (27, 27, 27), (40, 40, 40)]
    read((2, 1, 0), (40, 40, 40), 0)
    assert asked[-1] == (100, 100, 40)  # what the visit with the smallest voxels along each axis needs
    read((0, 0), None, None)
    assert asked[-1] is None
    BoxReader(read.read, None)((0, 0), (40, 40, 40), 0)
    assert asked[-1] == (40, 40, 40)


def test_views_are_compared_with_visits_in_millimetres():
    table = pd.DataFrame({"subject": ["sub-01", "sub-02"], "session": ["ses-1", "ses-1"]})
    shapes = np.array([[200, 200, 24], [60, 60, 60]])
    steps = voxels_per_step(np.array([[0.8, 0.8, 5.0], [3.0, 3.0, 3.0]]), [2.0, 2.0, 2.0])
    refuse_large_views((60, 60, 60), shapes, steps, None, table)  # 24 slices of 5 mm hold 120 mm
    with pytest.raises(InputError, match=r"64×64×64 voxels, 160×160×25\.6 of its, do not fit into 1 visit.*sub-01"):
        refuse_large_views((64, 64, 64), shapes, steps, None, table)
    with pytest.raises(InputError, match="do not fit into source_size"):
        refuse_large_views((60, 60, 60), shapes, steps, (64, 64, 48), table)
