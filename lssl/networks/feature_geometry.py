"""Geometry of features: channels, strides and places of a network's taps, measured on small probes.

**Stride and grid.** In a network made linear and positive (:class:`lssl.networks.linear_probe.LinearMode`), a feature's
response to a ramp, divided by its response to a constant, is the centre of its receptive field. These centres are read
at all indices whose field does not reach the ends of the probe, and averaged over 32 voxels: a transposed convolution
copies each coarse feature to several fine ones, whose places are right on average only. The averages must lie on one
regular grid, ``stride · f + offset``. If they do not, the network is refused.

**One centre or several.** The linear network runs with several weightings of the paths that meet in sums and
concatenations. If the offset is the same in all, every path has the same centre, and that is the offset. It is exact in
expectation over kernels that prefer no side, as initial weights are.

**Energy centroid.** If paths differ (a strided 3×3×3 convolution is centred on voxel 2f, a pooled skip on 2f + ½), the
place depends on how much each path counts. It is then what a loss sees: the centroid of the energy of the gradient of
a random mix of channels, under the network's own weights (:mod:`lssl.networks.gradient_centroid`). It is measured when
the backbone is built, under its initial weights; a checkpoint carries the places that its network was trained with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lssl.networks.gradient_centroid import Centroid, gradient_centroids
from lssl.networks.linear_probe import LinearMode, without_parameters
from lssl.networks.tapped import output_maps, tapped, tokens_to_map
from lssl.utils.errors import InputError

__all__ = ["Measured", "Tap", "measure"]

Triple = tuple[float, float, float]

DRAWS = 3  # weightings of paths
PERIOD = 32  # voxels over which centres are averaged: the stride of the coarsest level that may reach a tap
IRREGULAR = 0.02  # strides by which centres may leave a regular grid: rounding, no more
SIDES = [(128, 16), (128, 32), (128, 64), (64, 64), (96, 96), (128, 128), (32, 32), (48, 48), (80, 80)]


@dataclass(frozen=True)
class Tap:
    """A named feature map.

    Feature index ``f`` is centred at view index ``stride · f + offset``.

    Attributes:
        module: path of the submodule whose output is tapped.
        channels: number of channels.
        stride: view voxels per feature, per axis.
        offset: view index on which feature 0 is centred, per axis.
        uncertainty: two standard deviations, in voxels, of the offset between channels, positions and draws of the
            measurement, per axis; 0 where all paths have one centre.
    """

    module: str
    channels: int
    stride: tuple[int, int, int]
    offset: Triple
    uncertainty: Triple = (0.0, 0.0, 0.0)


@dataclass
class Measured:
    """Result of :func:`measure`."""

    taps: dict[str, Tap] = field(default_factory=dict)
    out_channels: int = 0


@dataclass
class _Axis:
    """What one probe says of one tap along one axis."""

    stride: int
    offset: float
    one_centre: bool


def measure(network: nn.Module, paths: Mapping[str, str], in_channels: int) -> Measured:
    """Channels, stride, place and its uncertainty of every tap; see the module.

    The network is left as it was, and so is torch's global generator.

    Raises:
        InputError: for a tap that is not a map, is not used, does not see the image, is overwritten in place, has no
            whole stride, or whose features do not lie on a regular grid.
    """
    result, axes = Measured(), []
    with torch.random.fork_rng(devices=[]):
        probe = without_parameters(network)
        for axis in range(3):
            features, side = _linear_features(probe, paths, in_channels, axis)
            result.out_channels = features.pop("output").shape[1]
            channels = {name: value.shape[1] for name, value in features.items()}
            axes.append({name: _axis(name, paths[name], value, side, axis) for name, value in features.items()})
        for name, path in paths.items():
            found = [axis[name] for axis in axes]
            stride, offset = _three(a.stride for a in found), _three(a.offset for a in found)
            result.taps[name] = Tap(path, channels[name], stride, offset)
        for axis in range(3):
            mixed = {name: axes[axis][name].stride for name in paths if not axes[axis][name].one_centre}
            if mixed:
                measured = gradient_centroids(network, {name: paths[name] for name in mixed}, in_channels, axis, mixed)
                for name, centroid in measured.items():
                    result.taps[name] = _with_centroid(result.taps[name], axis, centroid)
    return result


def _three(values: Iterable) -> tuple:
    return tuple(values)


def _with_centroid(tap: Tap, axis: int, centroid: Centroid) -> Tap:
    offset, uncertainty = list(tap.offset), list(tap.uncertainty)
    if math.isfinite(centroid.offset):
        offset[axis], uncertainty[axis] = round(centroid.offset, 3) + 0.0, round(centroid.uncertainty, 3)
    else:  # weights of zero pass no gradient: paths count alike
        uncertainty[axis] = float(tap.stride[axis])
    return replace(tap, offset=_three(offset), uncertainty=_three(uncertainty))


def _axis(name: str, path: str, features: Tensor, side: int, axis: int) -> _Axis:
    """Stride and offset along one axis, from responses ``(3 · draws, C, d, h, w)`` to ramp, constant and ends."""
    if features.ndim != 5:
        raise InputError(f"backbone: tap '{name}' gives {features.ndim}-D output; a tap is a (B, C, D, H, W) map.")
    n = features.shape[2 + axis]
    stride = round(side / n)
    if stride * n != side:
        raise InputError(
            f"backbone: tap '{name}' has {n} features for {side} voxels, so its stride is not a whole number."
        )
    response = features.movedim(2 + axis, -1).sum((1, 2, 3), dtype=torch.float64)
    ramp, mass, ends = response.unflatten(0, (3, DRAWS))  # (draws, n) each
    away = ramp / mass * side + (side - 1) / 2 - stride * torch.arange(n)
    if not away[:, n // 2].isfinite().all():
        raise InputError(
            f"backbone: tap '{name}' ('{path}') does not depend on the image, so its features have no position."
        )
    period = min(n, max(1, round(PERIOD / stride)))
    clean = (ends.abs() <= 1e-5 * mass.abs()).all(0).nonzero()[:, 0].tolist()
    first, last = (clean[0], clean[-1] + 1) if clean else (0, 0)
    if last - first < period:  # fields reach the ends everywhere: the middle is least affected
        first = (n - period) // 2
        last = first + period
    offsets = away[:, first:last].unfold(1, period, 1).mean(2)  # (draws, positions)
    middle = offsets[:, offsets.shape[1] // 2]
    displaced = (offsets - middle[:, None]).abs().max().item()
    if displaced > IRREGULAR * stride:
        raise InputError(
            f"backbone: features of tap '{name}' do not lie on a regular grid: towards the ends of {side} voxels they "
            f"are displaced by {displaced:.1f} voxels, as align_corners=True does; upsample without it (BasicUNet: "
            "upsample='deconv'), or tap the encoder alone."
        )
    one_centre = (middle - middle[0]).abs().max().item() <= 1e-3 * stride + 1e-3
    return _Axis(stride, round(middle[0].item(), 3) + 0.0, one_centre)


@torch.no_grad()
def _linear_features(
    probe: nn.Module, paths: Mapping[str, str], in_channels: int, axis: int
) -> tuple[dict[str, Tensor], int]:
    """Responses to a ramp along ``axis``, a constant and the ends, and the probe's side; the first size that fits."""
    errors = []
    for long, short in SIDES:
        size = [short] * 3
        size[axis] = long
        at = torch.arange(long)
        profiles = [(at - (long - 1) / 2) / long, torch.ones(long), (torch.minimum(at, long - 1 - at) < long // 16)]
        shape = [1, 1, 1]
        shape[axis] = long
        images = torch.stack([profile.float().view(shape).expand(size) for profile in profiles])
        images = images.repeat_interleave(DRAWS, 0).unsqueeze(1).repeat(1, in_channels, 1, 1, 1)
        mode = LinearMode(len(images), DRAWS)
        try:
            with mode, tapped(probe, paths, stop=False) as features:
                mode.watched = features
                output = output_maps(probe(images))[0]
        except (RuntimeError, ValueError, AssertionError) as error:  # the network needs another size; try the next
            errors.append(f"{tuple(size)}: {error}")
            continue
        for name in mode.overwritten:
            raise InputError(
                f"backbone: the network overwrites tap '{name}' ('{paths[name]}') in place; tap what follows."
            )
        missing = [name for name in paths if name not in features]
        if missing:
            raise InputError(f"backbone: tap '{missing[0]}' ('{paths[missing[0]]}') is not used when the network runs.")
        found = {name: tokens_to_map(value, size) for name, value in features.items()}
        return {**found, "output": output}, long
    raise InputError(f"backbone: {type(probe).__name__} accepts no probe image; the last error was {errors[-1]}")
