"""Deep supervision: one loss over several outputs of a network, from fine to coarse."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["deep_supervision"]


def deep_supervision(loss: Callable[[Tensor, Tensor], Tensor], outputs: Sequence[Tensor], target: Tensor) -> Tensor:
    """``Σ_i w_i L(output_i, target_i)`` with ``w_i = 2^-i / Σ_j 2^-j``; of one output, its loss.

    As in nnU-Net, which leaves the coarsest output out; here every output counts. The target is brought to the grid of
    each output by its nearest voxels.

    Paper: https://arxiv.org/abs/1409.5185. Reference code: https://github.com/MIC-DKFZ/nnUNet.

    Args:
        loss: of logits ``(B, K, D, H, W)`` and classes ``(B, D, H, W)``.
        outputs: logits, the finest first.
        target: ``(B, D, H, W)`` integers on the grid of the finest output.

    Example:
        >>> import torch
        >>> from torch.nn.functional import cross_entropy
        >>> from lssl.losses.deep_supervision import deep_supervision
        >>> fine, coarse = torch.zeros(1, 2, 4, 4, 4), torch.zeros(1, 2, 2, 2, 2)
        >>> deep_supervision(cross_entropy, [fine, coarse], torch.zeros(1, 4, 4, 4, dtype=torch.long))
        tensor(0.6931)
    """
    weights = [2.0**-i for i in range(len(outputs))]
    losses = [weight * loss(logits, _at(target, logits)) for weight, logits in zip(weights, outputs, strict=True)]
    return torch.stack(losses).sum() / sum(weights)


def _at(target: Tensor, logits: Tensor) -> Tensor:
    size = logits.shape[2:]
    if target.shape[1:] == size:
        return target
    return F.interpolate(target[:, None].double(), size, mode="nearest-exact")[:, 0].to(target.dtype)
