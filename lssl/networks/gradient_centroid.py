r"""Where features lie under a network's own weights: the centroid of the energy of their gradient.

Let ``g = ∂(r · φ_f)/∂I`` be the gradient of feature ``f``, its channels mixed by random signs ``r``, with respect to
the image ``I``, as a loss sends it back. With ``J`` the Jacobian, the place of ``f`` along an axis is

.. math:: c(f) = \frac{\sum_x x\, E_r\, g(x)^2}{\sum_x E_r\, g(x)^2}
               = \frac{\sum_x x \sum_c J_{cf,x}^2}{\sum_{c,x} J_{cf,x}^2}

and the offset is the mean of ``c(f) − stride · f``, weighted by energy. Where paths of centres ``c_p`` meet, it is
their mean weighted by energy, ``Σ E_p c_p / Σ E_p``.

All features are measured at once. For white noise ``n``, ``E[(J n)_f (J (x n))_f] = Σ_x x J_{f,x}²``: two directional
derivatives give an unbiased estimate of the moment, and ``E[(J n)_f²]`` is the energy. Derivatives are differences of
two forward passes, so any network will do. Norms with batch statistics see both images in one batch, as in training.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lssl.networks.tapped import StopForward, tapped, tokens_to_map
from lssl.utils.errors import InputError

__all__ = ["Centroid", "gradient_centroids"]

DRAWS = 3
STEP = 1 / 256  # of the differences, in standard deviations of the image
GROUPS = 4  # of channels, between which offsets are compared
WIDTH = 2.0  # standard deviations; by one, some places of SegResNet are off by 0.85 of it, against autograd
SIDES = [(128, 32), (128, 64), (96, 96), (64, 64), (128, 128), (32, 32), (48, 48), (80, 80)]


@dataclass
class Centroid:
    """An offset in voxels, and two standard deviations over groups of channels, positions and draws."""

    offset: float
    uncertainty: float


@torch.no_grad()
def gradient_centroids(
    network: nn.Module, paths: Mapping[str, str], in_channels: int, axis: int, strides: Mapping[str, int]
) -> dict[str, Centroid]:
    """Tap → energy centroid along one axis; the network is left as it was.

    Args:
        network: in any mode; dropout is off, and batch norm takes batch statistics.
        paths: tap → submodule.
        in_channels: of the image.
        axis: 0, 1 or 2.
        strides: tap → voxels per feature along this axis.
    """
    probe = copy.deepcopy(network).cpu().float().eval()
    for module in probe.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    generator = torch.Generator().manual_seed(axis)
    found: dict[str, list[Tensor]] = {name: [] for name in paths}
    for _ in range(DRAWS):
        features, side = _responses(probe, paths, in_channels, axis, generator)
        for name, value in features.items():
            found[name].append(_moments(value, side, axis, strides[name]))
    return {name: _centroid(torch.stack(moments)) for name, moments in found.items()}


def _responses(
    probe: nn.Module, paths: Mapping[str, str], in_channels: int, axis: int, generator: torch.Generator
) -> tuple[dict[str, Tensor], int]:
    """Features of noise, and of noise moved along two directions; and the side of the image."""
    error: Exception | None = None
    for long, short in SIDES:
        size, shape = [short] * 3, [1, 1, 1]
        size[axis] = shape[axis] = long
        image, noise = torch.randn(2, in_channels, *size, generator=generator)
        ramp = ((torch.arange(long) - (long - 1) / 2) / long).view(shape)
        images = torch.stack([image, image + STEP * noise, image + STEP * ramp * noise])
        try:
            with tapped(probe, paths, stop=True) as features, suppress(StopForward):
                probe(images)
        except (RuntimeError, ValueError, AssertionError) as caught:
            error = caught
            continue
        return {name: tokens_to_map(value, size) for name, value in features.items()}, long
    raise InputError(f"backbone: {type(probe).__name__} accepts no probe image; the last error was {error}")


def _moments(features: Tensor, side: int, axis: int, stride: int) -> Tensor:
    """``(2, groups of channels, parts of the middle)``: moment about ``stride · f``, and energy.

    The middle half of the probe counts. There, fields do not reach the ends, or little of them does.
    """
    base, moved, ramped = features.double().movedim(2 + axis, -1).flatten(2, 3)  # (C, other positions, n) each
    n = base.shape[-1]
    gradient = moved - base
    nominal = stride * torch.arange(n) - (side - 1) / 2
    moment = ((ramped - base) * side - nominal * gradient) * gradient
    both = torch.stack([moment, gradient.square()]).sum(2)
    first, last = n // 4, max(n - n // 4, n // 4 + 1)
    parts = [part.sum(-1) for part in both[..., first:last].tensor_split(min(2, last - first), -1)]
    groups = [part.sum(1) for part in torch.stack(parts, -1).tensor_split(min(GROUPS, both.shape[1]), 1)]
    return torch.stack(groups, 1)


def _centroid(moments: Tensor) -> Centroid:
    """From ``(draws, 2, groups, parts)``."""
    moment, energy = moments.movedim(1, 0).flatten(1)
    each = moment / energy
    deviation = (energy * (each - moment.sum() / energy.sum()).square()).sum() / energy.sum()
    return Centroid((moment.sum() / energy.sum()).item(), WIDTH * deviation.sqrt().item())
