"""Operations of a step: how many kernels a GPU would be asked to launch, a count that no machine changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CountOperations"]

_FREE = {"aten._unsafe_view", "aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty"}


class CountOperations(TorchDispatchMode):
    """Counts aten operations other than views of tensors and allocations; backward passes are counted too.

    Host work in numpy is not counted. Random draws of torch on the CPU are, although no device runs them.

    Attributes:
        found: operation → how often.

    Example:
        >>> import torch
        >>> with CountOperations() as operations:
        ...     _ = (torch.ones(2, 2) + 1).T
        >>> operations.total
        2
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._paused = 0

    @property
    def total(self) -> int:
        """Number of operations."""
        return self.found.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See :class:`TorchDispatchMode`."""
        name = f"{func.namespace}.{func._schema.name.split('::')[1]}"
        alias = [value.alias_info for value in func._schema.returns if value.alias_info is not None]
        view = bool(alias) and not any(info.is_write for info in alias) and name != "aten.lift_fresh"
        if not (self._paused or view or name in _FREE):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def without(self, *modules: nn.Module) -> Iterator[None]:
        """Inside this context, the forward passes of these modules are not counted."""

        def enter(*_: object) -> None:
            self._paused += 1

        def leave(*_: object) -> None:
            self._paused -= 1

        handles = [module.register_forward_pre_hook(enter) for module in modules]
        handles += [module.register_forward_hook(leave, always_call=True) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
