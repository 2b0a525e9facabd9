"""Deep supervision: weights that halve and sum to 1, each output against the target on its own grid."""

import torch

from lssl.losses import DiceCE, deep_supervision


def error(logits, target):
    return (logits[:, 0] - target).abs().mean()


def test_weights_and_grids_by_hand():
    target = torch.arange(64).view(1, 4, 4, 4)
    outputs = [torch.zeros(1, 1, side, side, side) for side in (4, 2, 1)]
    coarse = [float(target[0, 2 * x + 1, 2 * y + 1, 2 * z + 1]) for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    fine, middle, one = 31.5, sum(coarse) / 8, float(target[0, 2, 2, 2])
    assert abs(deep_supervision(error, outputs, target).item() - (4 * fine + 2 * middle + one) / 7) < 1e-5


def test_one_output_is_the_plain_loss_and_unknown_voxels_stay_unknown():
    logits, target = torch.randn(2, 3, 4, 4, 4), torch.randint(-1, 3, (2, 4, 4, 4))
    assert torch.equal(deep_supervision(DiceCE(), [logits], target), DiceCE()(logits, target))
    coarse = torch.randn(2, 3, 2, 2, 2)
    seen = []
    deep_supervision(lambda _, part: seen.append(part) or torch.zeros(()), [logits, coarse], target)
    assert seen[0] is target
    assert torch.equal(seen[1], target[:, 1::2, 1::2, 1::2])
    assert seen[1].dtype == target.dtype
