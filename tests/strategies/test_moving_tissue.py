"""Every term that compares two places follows the tissue, where a field tells how it moves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from moving import PHI, drawn, motion_over
from test_all_ranks import SIZE, TASKS

from lssl.evaluation.representation import held_out_pairs
from lssl.segmentation.segmenter import Segmenter
from lssl.views import geometry as geo
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


def test_the_monitor_matches_places_of_the_tissue(make_batch):
    task = TASKS["LongitudinalLocal InfoNCE"]()
    task.views = ViewSampler(SIZE, correspondence="field")
    batch = make_batch(1, labels=True)
    batch.motion, batch.motion_affine = motion_over(batch.affines, batch.size)
    (case,) = held_out_pairs(task, [batch])
    shared = {tap: points for tap, points in case.points_mm.items() if len(points)}
    assert "encoder" in shared
    for tap, points in shared.items():
        torch.testing.assert_close(case.places[tap], geo.transform(PHI, points), rtol=0, atol=1e-4)
