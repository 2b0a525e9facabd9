"""The entropy focus criterion: a proxy for motion during a scan."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["entropy_focus"]


def entropy_focus(image: Tensor) -> Tensor:
    r"""How far an image is from dark with few bright voxels; ghosts and blur of motion make it higher.

    Atkinson et al., IEEE Transactions on Medical Imaging 1997, normalised for the number of voxels N as in MRIQC
    (Esteban et al., PLoS ONE 2017):

    .. math::

       - \sum_v \frac{x_v}{b} \ln \frac{x_v}{b} \Big/ \big(\sqrt N \ln \sqrt N\big), \qquad b = \sqrt{\sum_v x_v^2}

    0 for one bright voxel, 1 if all are equal. It depends on contrast, field of view and masking too: compare visits
    of one protocol.

    Args:
        image: any shape; negative intensities count as 0.

    Returns:
        A number; NaN if no voxel is above 0.

    Example:
        >>> round(entropy_focus(torch.ones(4, 4, 4)).item(), 6)
        1.0
    """
    x = image.double().clamp_min(0)
    x = x / x.square().sum().sqrt()
    most = math.sqrt(x.numel()) * math.log(math.sqrt(x.numel()))
    return -torch.special.xlogy(x, x).sum() / most
