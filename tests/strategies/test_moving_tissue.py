"""Every term that compares two places follows the tissue, where a field tells how it moves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from moving import drawn
from test_all_ranks import SIZE, TASKS

from lssl.segmentation.segmenter import Segmenter
from lssl.views.sampler import ViewSampler

FOLLOW = {  # task → terms that compare places of two visits
    "LongitudinalLocal": {"similarity"},
    "LongitudinalLocal InfoNCE": {"similarity"},
    "PriorGuidedLocal": {"similarity"},
    "PriorGuidedLocal InfoNCE": {"similarity"},
    "AnatomicalEmbedding": {"fine", "coarse"},
    "Segmenter": {"consistency"},
}


@pytest.mark.parametrize("name", FOLLOW)
def test_terms_are_those_of_a_frame_that_moves_with_the_tissue(name, make_batch):
    batch = make_batch(4, labels=True)
    views = drawn(batch, ViewSampler(SIZE))
    still = tuple(dataclasses.replace(view, motion=None) for view in views[1])
    values = []
    for first, second in (*views, still):
        torch.manual_seed(0)
        task = TASKS[name]()
        task.loss_weights = dict.fromkeys(task.loss_weights, 1.0)
        task.generator.manual_seed(0)
        if isinstance(task, Segmenter):  # untrained, it would predict the same everywhere
            for parameter in task.parameters():
                parameter.data *= 8
        terms = task.terms(first, second) if isinstance(task, Segmenter) else task.terms(first, second, batch)
        values.append({key: value.item() for key, value in terms.items()})
    expected, found, unmoved = values
    assert found == pytest.approx(expected, rel=2e-5)
    for term in FOLLOW[name]:
        assert abs(unmoved[term] - expected[term]) > 5e-4 * abs(expected[term])
