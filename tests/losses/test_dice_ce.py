"""DiceCE against MONAI, against loops in float64, and with gaps in the labels."""

import pytest
import torch
from monai.losses import DiceCELoss

from lssl.losses import DiceCE


@pytest.fixture
def batch(generator):
    logits = torch.randn(2, 4, 5, 6, 7, generator=generator)
    return logits, torch.randint(0, 4, (2, 5, 6, 7), generator=generator)


def test_it_is_monais_where_every_voxel_has_a_label(batch):
    logits, target = batch
    theirs = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)(logits, target[:, None])
    torch.testing.assert_close(DiceCE()(logits, target), theirs)


def test_weights_act_on_the_entropy_alone(batch):
    logits, target = batch
    weight = torch.tensor([0.1, 1.0, 2.0, 5.0])
    probability = logits.double().softmax(1)
    above = below = 0.0
    for sample, i, j, k in torch.ones_like(target).nonzero().tolist():
        label = target[sample, i, j, k]
        above -= weight[label] * probability[sample, label, i, j, k].log()
        below += weight[label]
    dice = 0.0
    for number in (1, 2, 3):
        mine, true = probability[:, number], (target == number).double()
        dice += (1 - (2 * (mine * true).sum() + 1e-5) / (mine.sum() + true.sum() + 1e-5)) / 3
    assert DiceCE(weight)(logits, target).item() == pytest.approx((above / below + dice).item(), rel=1e-5)


def test_voxels_without_label_do_not_count(batch):
    """As if the volume ended before them; and they get no gradient."""
    logits, target = batch
    target[:, 3:] = -1
    logits.requires_grad_()
    loss = DiceCE(torch.tensor([0.1, 1.0, 2.0, 5.0]))
    found = loss(logits, target)
    torch.testing.assert_close(found, loss(logits[:, :, :3], target[:, :3]))
    (gradient,) = torch.autograd.grad(found, logits)
    assert gradient[:, :, 3:].abs().max() == 0
    assert gradient[:, :, :3].abs().min() > 0


def test_nothing_labelled_is_zero_with_a_graph(batch):
    logits, target = batch
    logits.requires_grad_()
    loss = DiceCE()(logits, torch.full_like(target, -1))
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert torch.isfinite(logits.grad).all()
