"""DifferenceWeighting: a network's decoder sees the features of the later visit, weighted by how they have changed.

The Difference Weighting Block of Rokuss et al. (2024, arXiv:2409.13416), after a public copy of the authors' code. At
every skip connection and at the bottleneck, the decoder gets

    later + later · norm(later - earlier),

with an instance norm of its own, whose scale and shift per channel are learned (1 and 0 at first). The encoder is
shared and sees each visit alone. Of two equal visits, the decoder gets later · (1 + shift): at first, what the network
sees of the later visit alone. The norm brings every difference within a window to unit variance, also mere noise.

**Any network.** The encoder's maps are changed where modules of the decoder get them, so what follows in the encoder
stays as it is. Both visits pass the encoder in one batch, the earlier ones first; maps with both of them come from the
encoder. A module that gets two maps or more, at least one of them from the encoder, merges them, as MONAI's
``UpCat(x, x_e)`` does; from there on, maps are those of the later visits. A pass without data finds these modules. The
bottleneck is weighted where it first meets a skip connection. A network that merges in its own ``forward``, by a sum or
a concatenation, has no such module and is refused.

Deviation: with batch norm, the encoder's statistics are those of both visits together; in the published code, of each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lssl.networks.tapped import output_maps
from lssl.utils.errors import InputError

__all__ = ["DifferenceWeighting"]

PAIRS = 2  # in the pass that finds the modules: a map of one pair would broadcast against one of both visits


class DifferenceWeighting(nn.Module):
    """Weights what the decoder of a network gets from its encoder; see the module.

    Args:
        network: maps ``(B, C, D, H, W)`` to a map, or to several for deep supervision. It is not changed.
        in_channels: its image channels, of one visit.
        size: voxels of the images.

    Attributes:
        paths: of the merging modules within the network, in the order of their calls.
        norms: an instance norm for each map that each of them gets from the encoder.

    Raises:
        InputError: if it is not clear what the decoder gets from the encoder, or if that is a single voxel.
    """

    def __init__(self, network: nn.Module, in_channels: int, size: Sequence[int]) -> None:
        super().__init__()
        found = _find_merges(network, in_channels, size)
        self.paths = list(found)
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.InstanceNorm3d(shape[1], affine=True) for shape in shapes) for shapes in found.values()
        )

    @contextmanager
    def within(self, network: nn.Module, pairs: int) -> Iterator[None]:
        """Inside this context, the network answers images ``(2 · pairs, C, ...)`` with maps ``(pairs, C', ...)``.

        Args:
            network: that of ``__init__``, or a copy.
            pairs: number of pairs; the images are those of all earlier visits, then those of all later ones.
        """
        handles = []
        for path, norms in zip(self.paths, self.norms, strict=True):
            hook = self._weigh(norms, pairs)
            handles.append(network.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _weigh(norms: Any, pairs: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            ahead = iter(norms)

            def weigh(both: Tensor) -> Tensor:
                earlier, later = both.chunk(2)
                return later + later * next(ahead)(later - earlier)

            return _replace_both((args, kwargs), pairs, weigh)

        return hook


def _shows_both(value: Any, pairs: int) -> bool:
    return isinstance(value, Tensor) and value.ndim == 5 and len(value) == 2 * pairs


def _replace_both(given: Any, pairs: int, function: Callable[[Tensor], Tensor]) -> Any:
    """Arguments, also within lists, in which a function replaces the maps of both visits."""
    return tree_map_only(Tensor, lambda value: function(value) if _shows_both(value, pairs) else value, given)


def _find_merges(network: nn.Module, in_channels: int, size: Sequence[int]) -> dict[str, list[torch.Size]]:
    """Path of each module that merges → shapes of the maps that it gets from the encoder."""
    probe = copy.deepcopy(network).to("meta").eval()  # shapes alone: it takes no memory, and next to no time
    found: dict[str, list[torch.Size]] = {}
    for path, module in probe.named_modules():
        if path:
            module.register_forward_pre_hook(_watch(path, found), with_kwargs=True)
    images = torch.empty(2 * PAIRS, in_channels, *size, device="meta")
    try:
        with torch.no_grad():
            alone = all(len(one) == PAIRS for one in output_maps(probe(images)))
    except (RuntimeError, ValueError, TypeError) as error:  # the visits' numbers differ: a merge that was not seen
        raise _refusal(network, f" ({str(error).splitlines()[0].rstrip('.')})") from error
    if not alone:
        raise _refusal(network, "")
    if any(shape[2:].numel() == 1 for shapes in found.values() for shape in shapes):
        raise InputError(
            f"views: a crop of {'×'.join(map(str, size))} voxels leaves a single feature at the bottleneck, and the "
            f"norm of a difference (combine: weight) needs several; use a larger crop."
        )
    return found


def _watch(path: str, found: dict[str, list[torch.Size]]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        maps = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value.ndim == 5]
        if len(maps) < 2 or any(path.startswith(f"{outer}.") for outer in found):
            return None
        shapes = [value.shape for value in maps if _shows_both(value, PAIRS)]
        if path in found or not shapes:
            raise ValueError(f"'{path}' merges {'twice' if path in found else 'nothing of the encoder'}")
        found[path] = shapes
        return _replace_both((args, kwargs), PAIRS, lambda both: both[PAIRS:])

    return hook


def _refusal(network: nn.Module, why: str) -> InputError:
    return InputError(
        f"backbone: combine: weight changes skip connections, and where the modules of {type(network).__name__} get "
        f"them is not clear{why}; use a network whose modules merge them, such as BasicUNet or DynUNet, or set combine "
        f"to subtract."
    )
