"""Label maps of any integers as classes: lookups, weights, sides, and what is refused."""

import numpy as np
import pytest
import torch

from lssl.segmentation.classes import (
    Classes,
    LabelCounts,
    count_labels,
    ignored_values,
    refuse_empty,
    refuse_unknown,
)
from lssl.utils.errors import InputError


class Data:
    def __init__(self, *labels):
        self.labels = labels

    def read_label(self, row):
        return self.labels[row]


def label(left=17, right=53):
    volume = np.zeros((20, 4, 4), np.int16)
    volume[2:6] = left
    volume[14:18] = right
    volume[9:11, :2] = 7001
    return volume


@pytest.fixture
def counts():
    return count_labels(Data(label(), None), np.array([0, 1]))


def test_counts_by_half(counts):
    assert counts.seen == {0: [0, 17, 53, 7001]}
    assert (counts.left[17], counts.right.get(17), counts.left[7001], counts.right[7001]) == (64, None, 8, 8)
    assert [counts.side([value]) for value in (17, 53, 7001)] == [-1, 1, 0]


def test_found_classes_and_their_names(counts):
    classes = Classes.found(counts, {17: "left hippocampus", 53: "right hippocampus"})
    assert classes.names == ("left hippocampus", "right hippocampus", "7001")
    assert classes.number == 4
    table = classes.class_of_value()
    assert [int(table[value + 1]) for value in (-1, 0, 17, 53, 7001, 18)] == [-1, 0, 1, 2, 3, 0]
    assert classes.label_values().tolist() == [0, 17, 53, 7001]


def test_listed_classes_merge_and_leave_the_rest_to_the_background(counts):
    classes = Classes.from_map({"hippocampus": [17, 53]}, counts)
    assert [int(classes.class_of_value()[value + 1]) for value in (-1, 0, 17, 53)] == [-1, 0, 1, 1]
    weights = classes.weights(counts, 0.5)
    assert (weights[1] / weights[0]).item() == pytest.approx(((320 - 128) / 128) ** 0.5)
    assert classes.weights(counts, 0.0).tolist() == [1, 1]


def test_sides_are_exchanged_by_name(counts):
    classes = Classes.found(counts, {17: "Left-Hippocampus", 53: "Right-Hippocampus", 7001: "cleft"})
    assert classes.mirrored_class(counts, flips=True).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("names", [("L hippocampus", "R hippocampus"), ("hippocampus_lh", "hippocampus_rh")])
def test_other_words_for_sides(names, counts):
    classes = Classes.found(counts, dict(zip((17, 53), names, strict=True)))
    assert classes.mirrored_class(counts, flips=True).tolist() == [0, 2, 1, 3]


def test_sides_without_names_are_found_in_the_data(counts):
    nameless = Classes.found(counts, {17: "17", 53: "53"})
    with pytest.raises(InputError, match="class '17' lies on one side and has no partner"):
        nameless.mirrored_class(counts, flips=True)
    assert nameless.mirrored_class(counts, flips=False).tolist() == [0, 1, 2, 3]
    with pytest.raises(InputError, match="class 'left hippocampus' lies on one side"):
        Classes.from_map({"left hippocampus": [17], "rest": [7001]}, counts).mirrored_class(counts, flips=True)


def test_one_lesion_on_one_side_is_no_side():
    counts = count_labels(Data(np.where(label() == 53, 0, label())), np.array([0]))
    assert Classes.found(counts, {}).mirrored_class(counts, flips=True).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ({"caudate": [11]}, "'caudate' .11. is never seen in the labelled training visits, which hold 0, 17, 53, 7001"),
        ({"a": [17], "b": [17]}, "label 17 stands twice"),
        ({"air": [0]}, "whole numbers from 1 on"),
        ({}, "whole numbers from 1 on"),
    ],
)
def test_refused_lists(listed, words, counts):
    with pytest.raises(InputError, match=words):
        Classes.from_map(listed, counts)


def test_unknown_values_of_held_out_visits(counts):
    other = LabelCounts({}, {}, {5: [0, 17, 99]})
    with pytest.raises(InputError, match=r"sub-9 ses-1 holds the class 99, never seen"):
        refuse_unknown(Classes.found(counts, {}), other, {5: "sub-9 ses-1"})
    refuse_unknown(Classes.from_map({"x": [17]}, counts), other, {5: "sub-9 ses-1"})


def test_an_empty_label_map():
    counts = count_labels(Data(np.zeros((4, 4, 4), np.int16)), np.array([0]))
    with pytest.raises(InputError, match="no value but 0"):
        Classes.found(counts, {})


def test_weights_have_mean_one(counts):
    assert Classes.found(counts, {}).weights(counts, 0.5).mean().item() == pytest.approx(1.0)
    assert torch.isfinite(Classes.found(counts, {}).weights(counts, 0.5)).all()


def test_what_nobody_annotated_is_no_class_and_has_no_part_in_the_weights():
    half = label()
    half[:, 2:] = 255
    counts = count_labels(Data(half), np.array([0]))
    ignored = ignored_values(None, None, counts)
    assert ignored == (255,)
    classes = Classes.found(counts, {}, ignored)
    assert classes.names == ("Left-Hippocampus", "Right-Hippocampus", "7001")
    assert [int(classes.class_of_value()[value + 1]) for value in (-1, 0, 17, 255, 254)] == [-1, 0, 1, -1, 0]
    same = count_labels(Data(half[:, :2]), np.array([0]))
    assert classes.weights(counts, 0.5).tolist() == Classes.found(same, {}).weights(same, 0.5).tolist()
    refuse_unknown(classes, counts, {0: "a"})


def test_255_is_a_structure_where_it_is_listed_or_freesurfers():
    corpus_callosum = count_labels(Data(label(251, 255)), np.array([0]))
    assert ignored_values(None, None, corpus_callosum) == ()
    assert ignored_values(None, {"front": [255]}, count_labels(Data(label(1, 255)), np.array([0]))) == ()
    assert ignored_values([9, 9], None, corpus_callosum) == (9,)
    with pytest.raises(InputError, match="label 17 belongs to a class, too"):
        Classes.from_map({"a": [17]}, count_labels(Data(label()), np.array([0])), (17,))


def test_validation_without_any_class_is_refused(counts):
    classes = Classes.from_map({"a": [17]}, counts)
    refuse_empty(classes, counts)
    with pytest.raises(InputError, match="No labelled validation visit shows any"):
        refuse_empty(classes, count_labels(Data(label(53, 53)), np.array([0])))
