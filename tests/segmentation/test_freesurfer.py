"""FreeSurfer's numbers are known by name; other schemes are not mistaken for them."""

from __future__ import annotations

import torch

from lssl.segmentation.classes import Classes, LabelCounts
from lssl.segmentation.freesurfer import freesurfer_names


def counts(sides: dict[int, float]) -> LabelCounts:
    """Of value → share on the left."""
    left = {value: round(100 * share) for value, share in sides.items()}
    return LabelCounts(left, {value: 100 - number for value, number in left.items()}, {})


ASEG = {0: 0.5, 2: 1.0, 41: 0.0, 17: 0.97, 53: 0.03, 16: 0.5, 30: 0.99, 1035: 1.0, 2035: 0.0}


def test_names_and_partners_with_flips():
    classes = Classes.found(counts({value: share for value, share in ASEG.items() if value != 30}), {})
    named = dict(zip([group[0] for group in classes.values], classes.names, strict=True))
    assert named[17] == "Left-Hippocampus"
    assert named[53] == "Right-Hippocampus"
    assert named[16] == "Brain-Stem"
    assert named[1035] == "ctx-lh-insula"
    assert named[2035] == "ctx-rh-insula"
    swapped = classes.mirrored_class(counts(ASEG), flips=True)
    order = [0, *(group[0] for group in classes.values)]
    to = {order[k]: order[int(swapped[k])] for k in range(len(order))}
    assert to == {0: 0, 2: 41, 41: 2, 17: 53, 53: 17, 16: 16, 1035: 2035, 2035: 1035}
    assert swapped.dtype == torch.int64


def test_other_schemes_keep_their_numbers():
    tumours = {1: 0.6, 2: 0.4, 3: 0.5}
    assert freesurfer_names(tumours, tumours.__getitem__) == {}
    turns = {value: float(value % 2) for value in range(1, 117)}  # odd left, even right
    assert freesurfer_names(turns, turns.__getitem__) == {}
    mirrored = {2: 0.0, 41: 1.0}
    assert freesurfer_names(mirrored, mirrored.__getitem__) == {}


def test_one_lone_vessel_does_not_hide_the_names():
    names = freesurfer_names(ASEG, ASEG.__getitem__)
    assert names[30] == "Left-vessel"
    assert all(names[value] for value in ASEG if value)
