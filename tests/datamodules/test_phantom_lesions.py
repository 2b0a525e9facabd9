"""The phantom's lesions: nothing changes without them, and labels tell what images show."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lssl.datamodules.phantom import PhantomDataModule
from lssl.synthetic.phantom_lesions import Lesion, change_labels, paint_lesions
from lssl.utils.errors import InputError

SMALL = {"subjects": 4, "visits": 3, "size": 40, "spacing": 4.5}


def test_lesions_change_nothing_but_their_own_voxels():
    plain, with_them = PhantomDataModule(**SMALL), PhantomDataModule(**SMALL, lesions=6)
    one, other = plain.scan(1, 1), with_them.scan(1, 1)
    assert torch.equal(one.label, other.label)
    assert torch.equal(one.affine, other.affine)
    dark = (other.image / one.image.clamp_min(0.05))[other.change > 0]
    known = other.change
    assert (dark[torch.isin(known[known > 0], torch.tensor([1, 2, 4]))].median()) < 0.9
    far = torch.nn.functional.max_pool3d((known > 0).float()[None, None], 7, 1, 3)[0, 0] == 0
    seen = far & one.head & (one.image > 0.05)
    ratio = other.image[seen] / one.image[seen]
    assert ratio.std() < 1e-5  # one scale, of the brightest tissue
    assert abs(ratio.mean() - 1) < 0.01
    assert one.change is None


def test_fates_by_hand():
    new, grown = Lesion((0, 0, 0), 3.0, first=2), Lesion((0, 0, 0), 3.0, growth=1.0)
    gone, stable = Lesion((0, 0, 0), 3.0, gone=2), Lesion((0, 0, 0), 3.0)
    assert [new.radius_at(visit) for visit in range(4)] == [0, 0, 3, 3]
    assert [grown.radius_at(visit) for visit in (0, 1, 9)] == [3, 4, 7.5]
    assert [gone.radius_at(visit) for visit in range(4)] == [3, 3, 0, 0]
    points = torch.tensor([[0.0, 0, 0], [3.5, 0, 0], [4.5, 0, 0], [2.5, 0, 0]]).T
    label = torch.tensor([2, 41, 2, 3], dtype=torch.int16)  # the last is cortex
    expected = {new: (0, 1), grown: (4, 4), gone: (4, 3), stable: (4, 4)}
    for lesion, (before, after) in expected.items():
        assert change_labels(label, points, (lesion,), 1)[0] == before
        assert change_labels(label, points, (lesion,), 2)[0] == after
    assert change_labels(label, points, (grown,), 1).tolist() == [4, 2, 0, 0]
    value = paint_lesions(torch.ones(4), label, points, 1.0, (grown,), 1, 0.5)
    assert value.tolist() == [0.5, 0.5, 1.0, 1.0]  # 4 mm: the third is half a voxel outside


def test_every_fate_occurs_and_every_fourth_subject_is_stable():
    data = PhantomDataModule(**{**SMALL, "subjects": 5}, lesions=8, labels="change")
    data.setup("fit")
    seen = {}
    for row in range(len(data.table)):
        index, visit = data._visit_number(row)
        label = data.read_label(row)
        assert (label is None) == (visit == 0)
        if label is not None:
            seen.setdefault(index, set()).update(np.unique(label).tolist())
    assert seen[3] == {0, 4}
    assert set().union(*seen.values()) == {0, 1, 2, 3, 4}
    assert data.has_label().tolist() == (data.table["visit"] > 0).tolist()
    assert data.label_names == {1: "new", 2: "grown", 3: "vanished", 4: "stable"}
    for index in range(5):
        centres = torch.tensor([lesion.centre for lesion in data.lesions_of(index)])
        assert torch.pdist(centres).min() >= 14


@pytest.mark.slow
def test_a_visit_shows_its_new_lesions_and_the_one_before_did_not():
    """Labels follow the material: where a label says new, the later image is dark and the earlier one white matter."""
    data = PhantomDataModule(**{**SMALL, "spacing": 3.0, "size": 56, "subjects": 3}, lesions=8, labels="change")
    data.setup("fit")
    contrast = {}
    for row in np.flatnonzero(data.has_label()):
        images = [data.read(int(each)).image[0] for each in (row - 1, row)]
        label = torch.from_numpy(data.read_label(int(row)))
        anatomy = data.scan(*data._visit_number(int(row))).label
        white = [image[(label == 0) & ((anatomy == 2) | (anatomy == 41))].median() for image in images]
        for kind in (1, 3, 4):
            here = label == kind
            if here.sum() > 4:
                contrast.setdefault(kind, []).append(
                    [float(image[here].median() / level) for image, level in zip(images, white, strict=True)]
                )
    before, after = {}, {}
    for kind, pairs in contrast.items():
        before[kind], after[kind] = np.median(pairs, axis=0)
    assert before[1] > 0.9 > 0.8 > after[1]
    assert after[3] > 0.9 > 0.8 > before[3]
    assert before[4] < 0.8
    assert after[4] < 0.8


def test_change_needs_lesions():
    with pytest.raises(InputError, match="no change"):
        PhantomDataModule(labels="change")
