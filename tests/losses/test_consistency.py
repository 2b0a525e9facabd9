"""Consistency against loops in float64; what it does to confident, absent and constant predictions."""

import pytest
import torch

from lssl.losses import Consistency


@pytest.fixture
def pair(generator):
    p, q = (2 * torch.randn(2, 2, 4, 3, 4, 5, generator=generator)).softmax(2)
    valid = torch.rand(2, 3, 4, 5, generator=generator) < 0.7
    return p, q, valid


def by_loops(p, q, valid, targets, threshold=0.0, absent=True):
    losses = []
    for sample in range(len(p)):
        mine, its = p[sample].double().flatten(1), q[sample].double().flatten(1)
        counted = [v for v in range(mine.shape[1]) if valid[sample].flatten()[v] and its[:, v].max() >= threshold]
        terms = []
        for number in range(len(mine)):
            above = below = 0.0
            seen = False
            for v in counted:
                best = int(its[:, v].argmax()) == number
                seen |= best
                target = float(best) if targets == "hard" else its[number, v].item()
                own = mine[number, v].item()
                above += own * target
                below += own + target if targets == "hard" else own**2 + target**2
            if absent or seen:
                terms.append(1 - (2 * above + 1e-5) / (below + 1e-5))
        losses.append(sum(terms) / max(1, len(terms)))
    return losses


@pytest.mark.parametrize("targets", ["hard", "soft"])
@pytest.mark.parametrize(("threshold", "absent"), [(0.0, True), (0.7, True), (0.7, False)])
def test_against_loops(pair, targets, threshold, absent):
    p, q, valid = pair
    q[0, 3] *= 0  # class 3 is absent in the first sample's target
    expected = by_loops(p, q, valid, targets, threshold, absent)
    loss = Consistency(targets, threshold, absent)
    assert loss(p, q, valid).item() == pytest.approx(sum(expected) / 2, rel=1e-5)
    weighted = loss(p, q, valid, torch.tensor([1.0, 0.5]))
    assert weighted.item() == pytest.approx((expected[0] + 0.5 * expected[1]) / 2, rel=1e-5)


def test_the_target_gets_no_gradient(pair):
    p, q, valid = (part.requires_grad_() if part.is_floating_point() else part for part in pair)
    Consistency("soft")(p, q, valid).backward()
    assert p.grad.abs().max() > 0
    assert q.grad is None


@pytest.mark.parametrize("targets", ["hard", "soft"])
def test_a_constant_prediction_has_no_loss(targets):
    one = torch.zeros(1, 3, 2, 2, 2)
    one[:, 1] = 1
    assert Consistency(targets)(one, one, torch.ones(1, 2, 2, 2, dtype=torch.bool)).item() == pytest.approx(
        0.0, abs=1e-6
    )


def test_soft_targets_are_met_by_themselves(pair):
    """With plain sums below the fraction, equal soft predictions would not be the best there are."""
    p, _, valid = pair
    logits = p.log().requires_grad_()
    loss = Consistency("soft")(logits.softmax(1), p, valid)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-6


def test_no_valid_voxel_is_zero(pair):
    p, q, valid = pair
    p.requires_grad_()
    loss = Consistency("hard", absent=False)(p, q, torch.zeros_like(valid))
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert torch.isfinite(p.grad).all()
