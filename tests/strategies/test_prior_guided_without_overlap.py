"""Samples without a shared voxel add exactly nothing to prior-guided local pretraining."""

# ruff: noqa: F811

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_prior_guided import EVERYTHING, OBJECTIVES, SOURCE, TAPS, apart, batch, draw, make, terms  # noqa: F401


@pytest.mark.parametrize("how", ["far away", "background"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_sample_without_valid_voxels_is_an_exact_zero(make_batch, objective: str, how: str):
    batch = make_batch(3, SOURCE)
    strategy = make(objective=objective, taps=list(TAPS), loss_weights=EVERYTHING)
    first, second = apart(draw(strategy, batch), [1], how)
    found = terms(strategy, batch, (first, second))
    assert strategy.logged["skipped"].item() == pytest.approx(1 / 3)
    sum(found.values()).backward()
    for view in (first, second):
        assert view.image.grad[1].abs().sum() == 0
        assert all(view.image.grad[b].abs().sum() > 0 for b in (0, 2))
    for name, parameter in strategy.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name

    # and the others' mean is what they give without it
    changed = replace(first, image=torch.randn_like(first.image)), replace(second, image=torch.randn_like(first.image))
    for view, other in zip(changed, (first, second), strict=True):
        view.image[[0, 2]] = other.image.detach()[[0, 2]]
    for name, value in terms(strategy, batch, changed).items():
        torch.testing.assert_close(value, found[name])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_without_valid_voxels_is_an_exact_zero_with_all_its_gradients(make_batch, objective: str):
    batch = make_batch(2, SOURCE)
    strategy = make(objective=objective, loss_weights=EVERYTHING)
    found = terms(strategy, batch, apart(draw(strategy, batch), [0, 1], "far away"))
    assert {name: value.item() for name, value in found.items()} == dict.fromkeys(EVERYTHING, 0.0)
    assert strategy.logged["skipped"] == 1
    sum(found.values()).backward()
    trained = {name: p for name, p in strategy.named_parameters() if p.requires_grad}
    assert trained
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() == 0, name
