"""LabelContrast against loops over points in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lssl.losses import SupervisedContrast
from lssl.networks.backbone import Backbone, unet
from lssl.strategies import label_contrast
from lssl.strategies.label_contrast import LabelContrast
from lssl.utils.errors import InputError
from lssl.views import geometry as geo
from lssl.views.sampler import ViewSampler


def by_hand(z, label, temperature):
    """The loss of one sample by its definition, ``None`` without an anchor."""
    z = F.normalize(z.double(), dim=-1).tolist()
    label, losses = label.tolist(), []

    def likeness(i, j):
        return sum(a * b for a, b in zip(z[i], z[j], strict=True)) / temperature

    known = [n for n, value in enumerate(label) if value >= 0]
    for i in known:
        others = [a for a in known if a != i]
        positives = [p for p in others if label[p] == label[i]]
        if label[i] == 0 or not positives:
            continue
        total = sum(math.exp(likeness(i, a)) for a in others)
        losses.append(-sum(math.log(math.exp(likeness(i, p)) / total) for p in positives) / len(positives))
    return sum(losses) / len(losses) if losses else None


def test_the_loss_is_its_definition(generator):
    z = torch.randn(2, 3, 12, 5, generator=generator)
    label = torch.randint(-1, 4, (2, 3, 12), generator=generator)
    label[1, 2] = torch.arange(12).clamp_max(0)  # no anchor: this sample is left out
    found = SupervisedContrast(0.3)(z, label)
    for tap in range(2):
        each = [by_hand(z[tap, sample], label[tap, sample], 0.3) for sample in range(3)]
        each = [value for value in each if value is not None]
        assert found[tap].item() == pytest.approx(sum(each) / len(each), rel=1e-5)
    weight = torch.tensor([[1.0, 0, 0], [0, 3, 0]])
    weighted = SupervisedContrast(0.3)(z, label, weight)
    assert weighted[0].item() == pytest.approx(by_hand(z[0, 0], label[0, 0], 0.3), rel=1e-5)
    assert weighted[1].item() == pytest.approx(by_hand(z[1, 1], label[1, 1], 0.3), rel=1e-5)


def test_background_and_unknown_voxels_are_no_anchors(generator):
    z = torch.randn(1, 8, 4, generator=generator, requires_grad=True)
    loss = SupervisedContrast()
    assert loss(z, torch.zeros(1, 8, dtype=torch.long)) == 0
    assert loss(z, torch.full((1, 8), -1)) == 0
    label = torch.tensor([[1, 1, 0, 0, -1, -1, 2, 2]])
    loss(z, label).backward()
    moved = z.grad.abs().sum(-1)[0] > 0
    assert moved.tolist() == [True, True, True, True, False, False, True, True]


def with_labels(make_batch):
    """Two pairs whose labels are stripes along one axis, shifted at the second visit."""
    batch = make_batch(2, size=(20, 20, 20))
    stripes = (torch.arange(20) // 5).to(torch.int16).view(1, 1, 20, 1, 1).expand(2, 1, 20, 20, 20)
    batch.labels = torch.cat([stripes, stripes.roll(5, 2) + 10], 1).contiguous()
    return batch


def strategy(**options) -> LabelContrast:
    taps = {"fine": "upcat_1.convs.conv_1", "coarse": "upcat_2.convs.conv_1"}
    backbone = Backbone(unet(features=(4, 4, 4, 4, 4, 4)), taps)
    return LabelContrast(backbone, ["fine", "coarse"], samples=30, views=ViewSampler(16), **options).eval()


def test_each_view_has_the_labels_of_its_own_visit(make_batch):
    batch, task = with_labels(make_batch), strategy()
    views = task.views(batch, task.generator)
    seen = {}
    task.loss.register_forward_pre_hook(lambda _, given: seen.update(label=given[1]))
    task.terms(*views, batch)
    label = seen["label"]  # (T, B, 2 K): first all of view 1, then all of view 2
    first, second = label[..., :30], label[..., 30:]
    assert first.max() < 10
    assert second.min() >= 10


def test_labels_are_read_at_the_points(make_batch):
    batch, task = with_labels(make_batch), strategy()
    first, second = task.views(batch, task.generator)
    points = label_contrast.plan_points(
        first.host, second.host, [task.backbone.taps["fine"]], 30, label_contrast.host_generator(task.generator), True
    )
    voxels = torch.from_numpy(label_contrast._source_voxels((first.host, second.host), points.places))
    for side, view in enumerate((first, second)):
        found = view.source_label.flatten(1).gather(1, voxels[side])
        there = geo.sample_nearest(view.source_label, view.source_affine, torch.from_numpy(points.mm[0]), -1)
        assert torch.equal(found, there)


def test_without_labels_it_says_what_to_do(make_batch):
    batch, task = make_batch(2, size=(20, 20, 20)), strategy()
    batch.labels = None
    with pytest.raises(InputError, match="no visit of the batch has a label map"):
        task.terms(*task.views(batch, task.generator), batch)


def test_pairs_without_labels_are_counted(make_batch):
    batch, task = with_labels(make_batch), strategy()
    task.terms(*task.views(batch, task.generator), batch)
    assert task.logged["skipped"] == 0
    batch.labels[1] = -1
    task.terms(*task.views(batch, task.generator), batch)
    assert task.logged["skipped"] == 0.5


def test_structures_part_in_a_few_steps(make_batch):
    """Voxels of each stripe come together: the loss falls below that of the untrained network."""
    torch.manual_seed(0)
    batch, task = with_labels(make_batch), strategy().train()
    stripes = batch.labels.float()
    batch.images = (stripes % 10)[:, :, None] / 4 + 0.1  # what is to be learned is seen
    optimizer = torch.optim.AdamW(task.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        loss = task.terms(*task.views(batch, task.generator), batch)["contrast"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
