"""Geometry of features: channels, strides and centre offsets of a network's taps, measured on a small probe."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lssl.utils.errors import InputError

__all__ = ["Measured", "StopForward", "Tap", "measure", "tapped", "tokens_to_map"]

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Tap:
    """A named feature map.

    Feature index ``f`` is centred at view index ``stride · f + offset``.

    Attributes:
        module: path of the submodule whose output is tapped.
        channels: number of channels.
        stride: view voxels per feature, per axis.
        offset: view index on which feature 0 is centred, per axis.
    """

    module: str
    channels: int
    stride: tuple[int, int, int]
    offset: Triple


class StopForward(Exception):
    """Ends a forward pass after the last wanted tap."""


@contextmanager
def tapped(network: nn.Module, paths: Mapping[str, str], stop: bool) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of submodules during one forward pass.

    Refuses a network that overwrites a collected output in place, such as an activation after a tapped convolution.
    The check reads torch's version counter, which has no public getter. Both alternatives cost more: a copy of every
    feature, or a comparison that waits for the device.
    """
    features: dict[str, Tensor] = {}
    versions: dict[str, int] = {}

    def collect(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            features[name] = output
            versions[name] = 0 if output.is_inference() else output._version
            if stop and len(features) == len(paths):
                raise StopForward

        return hook

    handles = [network.get_submodule(path).register_forward_hook(collect(name)) for name, path in paths.items()]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
    for name, version in versions.items():
        if not features[name].is_inference() and features[name]._version != version:
            raise InputError(
                f"backbone: the network overwrites tap '{name}' ('{paths[name]}') in place; tap what follows."
            )


def tokens_to_map(features: Tensor, size: Sequence[int]) -> Tensor:
    """Tokens ``(B, N, C)`` of cubic patches of a ``(D, H, W)`` image as a map ``(B, C, d, h, w)``; maps pass."""
    if features.ndim != 3:
        return features
    patch = round((math.prod(size) / features.shape[1]) ** (1 / 3))
    grid = [side // max(1, patch) for side in size]
    if math.prod(grid) != features.shape[1]:
        return features
    return features.transpose(1, 2).unflatten(2, grid)


@dataclass
class Measured:
    """Result of :func:`measure`."""

    taps: dict[str, Tap] = field(default_factory=dict)
    out_channels: int = 0


def measure(network: nn.Module, paths: Mapping[str, str], in_channels: int) -> Measured:
    """Channels, stride and centre offset of every tap.

    A copy of the network is made linear and positive: kernels become uniform in space; biases, position embeddings and
    attention (which moves content, not coordinates) become zero; norms and activations become the identity; maxima
    become means. In such a network, a feature's response to a ramp along one axis is the ramp's mean over the receptive
    field. Divided by the response to a constant, this is the field's centre, ``stride · f + offset``. It is read in the
    middle of a long probe, far from any border. Where paths with different centres meet (a strided 3×3×3 convolution
    beside a mean-pooled skip), the result is their average.
    """
    probe = _linearised(network)
    result = Measured()
    sides: dict[str, list[tuple[int, int]]] = {name: [] for name in paths}
    centres: dict[str, list[Tensor]] = {name: [] for name in paths}
    channels: dict[str, int] = {}
    for axis in range(3):
        features, side = _probe_features(probe, paths, in_channels, axis)
        result.out_channels = features.pop("output").shape[1]
        for name, value in features.items():
            if value.ndim != 5:
                raise InputError(f"backbone: tap '{name}' gives {value.ndim}-D output; a tap is a (B, C, D, H, W) map.")
            channels[name] = value.shape[1]
            moment, mass = value.double().movedim(2 + axis, -1).flatten(2, 3).sum(2)  # (channels, n) each
            centres[name].append(moment.sum(0) / mass.sum(0) * side + (side - 1) / 2)
            sides[name].append((side, value.shape[2 + axis]))
    for name, path in paths.items():
        result.taps[name] = _tap(name, path, channels[name], sides[name], centres[name])
    return result


def _tap(name: str, path: str, channels: int, sides: list[tuple[int, int]], centres: list[Tensor]) -> Tap:
    stride, offset = [], []
    for (side, n), centre in zip(sides, centres, strict=True):
        step = side / n
        if step != round(step):
            raise InputError(
                f"backbone: tap '{name}' has {n} features for {side} voxels, so its stride is not a whole number."
            )
        away = centre - step * torch.arange(n)
        period = max(1, round(32 / step))  # period of the coarsest level that may reach the tap
        value = away[(n - period) // 2 :][:period].mean().item()
        if not math.isfinite(value):
            raise InputError(
                f"backbone: tap '{name}' ('{path}') does not depend on the image, so its features have no position."
            )
        stride.append(round(step))
        offset.append(round(value, 3) + 0.0)
    return Tap(path, channels, (stride[0], stride[1], stride[2]), (offset[0], offset[1], offset[2]))


@torch.no_grad()
def _probe_features(
    probe: nn.Module, paths: Mapping[str, str], in_channels: int, axis: int
) -> tuple[dict[str, Tensor], int]:
    """Features of a ramp along ``axis`` and of a constant, and the probe's side; uses the first probe that fits."""
    errors = []
    for long, short in [(256, 16), (256, 32), (256, 64), (64, 64), (96, 96), (128, 128), (32, 32), (48, 48), (80, 80)]:
        size = [short] * 3
        size[axis] = long
        ramp = (torch.arange(long) - (long - 1) / 2) / long
        shape = [1, 1, 1]
        shape[axis] = long
        images = torch.stack([ramp.view(shape).expand(size), torch.ones(size)])
        images = images.unsqueeze(1).repeat(1, in_channels, 1, 1, 1)
        try:
            with _Linear(), tapped(probe, paths, stop=False) as features:
                features["output"] = probe(images)
        except (RuntimeError, ValueError, AssertionError) as error:  # the network needs another size; try the next
            errors.append(f"{tuple(size)}: {error}")
            continue
        features = {name: tokens_to_map(value, size) for name, value in features.items()}
        missing = [name for name in paths if name not in features]
        if missing:
            raise InputError(f"backbone: tap '{missing[0]}' ('{paths[missing[0]]}') is not used when the network runs.")
        return features, long
    raise InputError(f"backbone: {type(probe).__name__} accepts no probe image; the last error was {errors[-1]}")


def _linearised(network: nn.Module) -> nn.Module:
    """A copy with uniform kernels of gain 1 and zeros for all other parameters; see :func:`measure`."""
    probe = copy.deepcopy(network).cpu().float().eval()
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.zero_()
        for module in probe.modules():
            if isinstance(module, nn.ConvTranspose3d):
                share = math.prod(k / s for k, s in zip(module.kernel_size, module.stride, strict=True))
                module.weight.fill_(1 / (share * module.in_channels / module.groups))
            elif isinstance(module, nn.Conv3d | nn.Linear):
                module.weight.fill_(1 / module.weight[0].numel())
            if isinstance(module, nn.Conv3d):
                module.padding_mode = "circular"  # zero padding would weaken paths unequally
    return probe


class _Linear(TorchFunctionMode):
    """While active, norms, activations and dropout do nothing; maxima and sums of maps are means; attention is zero."""

    PASS = re.compile(
        r"(batch|layer|group|instance|rms)_norm|normalize|(relu|relu6|leaky_relu|rrelu|prelu|elu|celu|selu|gelu|silu|mish"
        r"|softplus|hardswish|hardtanh|tanh|(alpha_|feature_alpha_)?dropout[123]?d?)_?"
    )
    GATES = frozenset(("sigmoid", "hardsigmoid"))

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if self.PASS.fullmatch(name):
            return args[0] if args else kwargs["input"]
        if name in self.GATES:
            return torch.ones_like(args[0])
        if name in ("add", "add_") and all(isinstance(a, Tensor) for a in args[:2]) and args[0].shape == args[1].shape:
            return torch.lerp(args[0], args[1], 0.5)  # paths that meet get equal weight
        if name in ("softmax", "scaled_dot_product_attention"):
            return torch.zeros_like(args[0])
        if name == "max_pool3d":
            return F.avg_pool3d(
                *args[:4], **{key: kwargs[key] for key in ("kernel_size", "stride", "padding") if key in kwargs}
            )
        return func(*args, **kwargs)
