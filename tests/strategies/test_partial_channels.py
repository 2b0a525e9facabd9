"""Every strategy, and the Segmenter, learns from visits that lack a channel and views that hide one."""

from __future__ import annotations

import pytest
import test_all_ranks
import torch
from helpers import few
from test_all_ranks import SIZE, TASKS, Network
from torch import nn

from lssl.networks.backbone import Backbone
from lssl.segmentation.segmenter import Segmenter
from lssl.views.sampler import ViewSampler


def two_channels(contrasts: str) -> dict:
    network = Network()
    network.encoder[0] = nn.Conv3d(2, 4, 2, stride=2)
    taps = {"encoder": "encoder", "deep": "deep", "decoder": "decoder"}
    return {"backbone": Backbone(network, taps, in_channels=2), "views": ViewSampler(SIZE, contrasts=contrasts)}


@pytest.mark.parametrize("name", few(TASKS, 1))
@pytest.mark.parametrize("contrasts", ["cross", "mix"])
def test_every_task_learns_from_some_of_the_channels(name: str, contrasts: str, make_batch, monkeypatch):
    monkeypatch.setattr(test_all_ranks, "common", lambda: two_channels(contrasts))
    batch = make_batch(4, labels=True)
    batch.images = torch.rand(4, 2, 2, *batch.size) + 0.5
    batch.labels %= 4
    batch.present = torch.tensor([[[True, True], [True, True]], [[True, False], [False, True]]] * 2)
    batch.images = batch.images * batch.present[..., None, None, None]
    task = TASKS[name]()
    task.generator.manual_seed(0)
    terms = task.losses({"labelled": batch}) if isinstance(task, Segmenter) else task.losses(batch)
    total = task.total(terms)
    total.backward()
    assert total.isfinite()
    gradients = [p.grad for p in task.backbone.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
