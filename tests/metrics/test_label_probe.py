"""A linear classifier of voxels, by numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lssl.metrics import LabelProbe


def voxels(noise: float = 0.8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Five subjects with ids out of order, four labels with names of their own, and 0."""
    draw = torch.Generator().manual_seed(seed)
    names = torch.tensor([0, 4, 17, 53])
    number = torch.randint(4, (400,), generator=draw)
    features = torch.randn(4, 6, generator=draw)[number] + noise * torch.randn(400, 6, generator=draw) + 10
    return features, names[number], torch.tensor([9, 2, 5, 30, 7])[torch.randint(5, (400,), generator=draw)]


def by_numpy(features: np.ndarray, labels: np.ndarray, subject: np.ndarray, ridge: float) -> float:
    half = np.array([sorted(set(subject)).index(name) % 2 for name in subject])
    scores = []
    for fit, test in ((0, 1), (1, 0)):
        x, y = features[half == fit], labels[half == fit]
        names, mean, scale = sorted(set(y)), x.mean(0), x.std(0, ddof=1)
        rows, hot = (x - mean) / scale, np.array([[float(label == name) for name in names] for label in y])
        slope = np.linalg.solve(rows.T @ rows + ridge * len(rows) * np.eye(rows.shape[1]), rows.T @ (hot - hot.mean(0)))
        output = (features[half == test] - mean) / scale @ slope + hot.mean(0)
        found, truth = np.array(names)[output.argmax(1)], labels[half == test]
        dice = [
            2 * ((found == k) & (truth == k)).sum() / ((found == k).sum() + (truth == k).sum())
            for k in names
            if k > 0 and (truth == k).any()
        ]
        scores.append(np.mean(dice))
    return float(np.mean(scores))


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_value_by_numpy_whatever_the_order_of_updates(ridge: float):
    data = voxels()
    expected = by_numpy(*(column.double().numpy() for column in data), ridge)
    assert 0.3 < expected < 0.95
    for order in (torch.arange(400), torch.randperm(400)):
        metric = LabelProbe(ridge)
        for part in order.split(90):
            metric.update(*(column[part] for column in data))
        assert metric.compute().item() == pytest.approx(expected, abs=1e-6)


def test_features_that_hold_the_labels_score_one_and_others_little():
    metric = LabelProbe()
    metric.update(*voxels(noise=0.01))
    assert metric.compute().item() == pytest.approx(1)
    metric.reset()
    features, labels, subject = voxels()
    metric.update(torch.randn_like(features), labels, subject)
    assert metric.compute().item() < 0.4


def test_what_holds_for_one_subject_only_does_not_count():
    """Each subject's features name its labels in a code of its own."""
    _, labels, subject = voxels()
    found = []
    for _ in range(8):
        metric = LabelProbe()
        metric.update(torch.randn(60, 31, 16)[labels, subject], labels, subject)
        found.append(metric.compute().item())
    assert np.mean(found) < 0.4  # a fit on the subjects themselves would be perfect


def test_one_subject_or_nothing_but_background_is_no_number():
    features, labels, subject = voxels()
    for data in ((features, labels, torch.ones_like(subject)), (features, torch.zeros_like(labels), subject)):
        metric = LabelProbe()
        metric.update(*data)
        assert math.isnan(metric.compute().item())
