"""Collects named feature maps during a forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["StopForward", "tapped", "tokens_to_map"]


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


def tokens_to_map(features: Tensor, size: Sequence[int]) -> Tensor:
    """Tokens ``(B, N, C)`` of cubic patches of a ``(D, H, W)`` image as a map ``(B, C, d, h, w)``; maps pass."""
    if features.ndim != 3:
        return features
    patch = round((math.prod(size) / features.shape[1]) ** (1 / 3))
    grid = [side // max(1, patch) for side in size]
    if math.prod(grid) != features.shape[1]:
        return features
    return features.transpose(1, 2).unflatten(2, grid)
