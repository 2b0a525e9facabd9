"""Blocks of a network, compiled or recomputed in the backward pass, with its taps left as they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lssl.utils.errors import InputError

__all__ = ["Blocks", "blocks_between"]

LARGEST = 8  # a block has at most this fraction of the network's leaf modules


class Blocks:
    """Runs the blocks between taps otherwise than module by module.

    ``torch.compile`` of a whole network leaves out the hooks that read taps. Compiled block by block, the hooks stay
    outside, and blocks of one kind take little time to compile. Recomputation (Chen et al., arXiv 1604.06174) keeps
    only the inputs of blocks; running statistics are put back after it, so that they see each batch once.

    A copy starts without compiled code, as the code refers to the weights of the original.

    Args:
        compiled: compile each block by ``torch.compile``; needs a C++ compiler.
        checkpointed: do not keep activations within a block, and compute them again in the backward pass.
    """

    def __init__(self, compiled: bool, checkpointed: bool) -> None:
        if compiled and not any(map(shutil.which, ("g++", "clang++", "cl"))):
            raise InputError(
                "backbone.compile: torch.compile needs a C++ compiler (g++ or clang++), and there is none."
            )
        self.compiled, self.checkpointed = compiled, checkpointed
        self._between: dict[tuple[str, ...], list[nn.Module]] = {}
        self._code: dict[nn.Module, Callable[..., Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Blocks:
        """A new one of the same settings."""
        return Blocks(self.compiled, self.checkpointed)

    def __reduce__(self) -> tuple[Any, ...]:
        """A new one of the same settings."""
        return Blocks, (self.compiled, self.checkpointed)

    @contextmanager
    def within(self, network: nn.Module, taps: Sequence[str]) -> Iterator[None]:
        """Calls of the network inside this context run so.

        Args:
            network: always the same one.
            taps: paths of the submodules whose outputs are read.
        """
        if not self.compiled and not self.checkpointed:
            yield
            return
        key = tuple(taps)
        if key not in self._between:
            self._between[key] = blocks_between(network, taps)
        for block in self._between[key]:
            block.forward = self._forward(block)  # an attribute of the instance: hooks and weights stay
        try:
            yield
        finally:
            for block in self._between[key]:
                del block.forward

    def _forward(self, block: nn.Module) -> Callable[..., Any]:
        plain = self._code.get(block) if self.compiled else block.forward
        if plain is None:
            plain = self._code[block] = torch.compile(_of_its_own(block.forward))
        if not self.checkpointed:
            return plain

        def recomputed(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return plain(*args, **kwargs)
            contexts = lambda: (nullcontext(), _same_buffers(block))  # noqa: E731
            return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts, **kwargs)

        return recomputed


def blocks_between(network: nn.Module, taps: Iterable[str]) -> list[nn.Module]:
    """The largest submodules of at least two layers that hold no tap and at most an eighth of all layers.

    Args:
        network: any.
        taps: paths of submodules.
    """
    tapped = {network.get_submodule(path) for path in taps}
    most = max(2, len(_leaves(network)) // LARGEST)
    found: list[nn.Module] = []
    ahead = list(network.children())
    while ahead:
        module = ahead.pop()
        inside = set(module.modules())
        callable_ = not isinstance(module, nn.ModuleList | nn.ModuleDict)
        if (
            callable_
            and not inside & tapped
            and 2 <= len(_leaves(module)) <= most
            and next(module.parameters(), None) is not None
        ):
            found.append(module)
        else:
            ahead += module.children()
    return list(dict.fromkeys(found))


def _leaves(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if next(part.children(), None) is None]


def _of_its_own(forward: Any) -> Callable[..., Any]:
    """The method with a code object of its own: torch counts recompilations by code, and blocks of a kind share it."""
    function = forward.__func__
    code = function.__code__.replace()
    copied = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied.__get__(forward.__self__)


@contextmanager
def _same_buffers(block: nn.Module) -> Iterator[None]:
    before: list[Tensor] = [buffer.clone() for buffer in block.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(block.buffers(), before, strict=True):
                buffer.copy_(value)
