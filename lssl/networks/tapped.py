"""Collects named feature maps during a forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from lssl.utils.errors import InputError

__all__ = ["StopForward", "output_maps", "tapped", "tokens_to_map"]


class StopForward(Exception):
    """Ends a forward pass after the last wanted tap."""


@contextmanager
def tapped(network: nn.Module, paths: Mapping[str, str], stop: bool) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of submodules during one forward pass.

    A network that overwrites a collected output in place would change it afterwards; a backbone is checked for that
    once, when it is measured (:func:`lssl.networks.feature_geometry.measure`).
    """
    features: dict[str, Tensor] = {}

    def collect(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            features[name] = output
            if stop and len(features) == len(paths):
                raise StopForward

        return hook

    handles = [network.get_submodule(path).register_forward_hook(collect(name)) for name, path in paths.items()]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def output_maps(result: object) -> list[Tensor]:
    """Outputs of a network with deep supervision, the finest first; of any other network, its output alone.

    nnU-Net's networks and MONAI's SegResNetDS give a list, MONAI's DynUNet a tensor ``(B, n, C, D, H, W)`` in training.

    Raises:
        InputError: for anything else than maps ``(B, C, D, H, W)`` of equally many channels.
    """
    if isinstance(result, Tensor):
        return [result] if result.ndim != 6 else list(result.unbind(1))
    found = list(result) if isinstance(result, (list, tuple)) else [result]
    maps = [one for one in found if isinstance(one, Tensor) and one.ndim == 5]
    if not maps or len(maps) < len(found) or len({one.shape[1] for one in maps}) > 1:
        kinds = ", ".join(
            "×".join(map(str, one.shape)) if isinstance(one, Tensor) else type(one).__name__ for one in found
        )
        raise InputError(
            f"backbone: the network returns a {type(result).__name__} ({kinds}); it must return a map (B, C, D, H, W), "
            f"or for deep supervision a list of maps of equally many channels."
        )
    return sorted(maps, key=lambda one: -one[0, 0].numel())


def tokens_to_map(features: Tensor, size: Sequence[int]) -> Tensor:
    """Tokens ``(B, N, C)`` of cubic patches of a ``(D, H, W)`` image as a map ``(B, C, d, h, w)``; maps pass."""
    if features.ndim != 3:
        return features
    patch = round((math.prod(size) / features.shape[1]) ** (1 / 3))
    grid = [side // max(1, patch) for side in size]
    if math.prod(grid) != features.shape[1]:
        return features
    return features.transpose(1, 2).unflatten(2, grid)
