"""The structure of a module as bytes without its weights, and back; reading it runs no foreign code.

A pickle names the classes that it needs. Here they must be trusted as those of a config are, and be classes of lssl or
modules of torch; anything else is refused before it is called.
"""

from __future__ import annotations

import importlib
import io
import math
import pickle
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from lssl.utils.errors import InputError
from lssl.utils.trust import check_classes

__all__ = ["pack", "unpack"]

CONTAINERS = {
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset", "slice", "complex", "bytearray", "range"},
    "lightning.fabric.utilities.data": {"AttributeDict"},
}
FUNCTIONS = ("torch.nn.functional", "torch._C._nn")  # activations that a module keeps as attributes


class _Writer(pickle.Pickler):
    """Tensors of the state_dict become their shapes; other tensors are kept; ``dropped`` objects become None."""

    def __init__(self, file: io.BytesIO, state: Collection[int], dropped: Collection[int]) -> None:
        super().__init__(file, protocol=4)
        self.state, self.dropped = state, dropped

    def persistent_id(self, obj: Any) -> Any:
        """How an object is written that is not pickled."""
        if id(obj) in self.dropped:
            return ("none",)
        if isinstance(obj, torch.Generator):
            return ("generator",)
        if isinstance(obj, torch.dtype | torch.memory_format):
            return "torch", str(obj).removeprefix("torch.")
        if not isinstance(obj, Tensor):
            return None
        kept = None
        if id(obj) not in self.state:
            plain = obj.detach().cpu().contiguous()
            kept = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        kind = "parameter" if isinstance(obj, nn.Parameter) else "tensor"
        return kind, id(obj), str(obj.dtype).removeprefix("torch."), tuple(obj.shape), obj.requires_grad, kept


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, path: str) -> None:
        super().__init__(file)
        self.path, self.made = path, dict[int, Tensor]()

    def find_class(self, module: str, name: str) -> Any:
        """A trusted class of lssl, a module of torch, or a value without behaviour."""
        if name in CONTAINERS.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if "." in name:
            raise InputError(f"{self.path} names {module}.{name}, which is not needed to build a network.")
        if module != "torch" and module not in FUNCTIONS:
            check_classes({"class_path": f"{module}.{name}"}, self.path)
        found = getattr(importlib.import_module(module), name, None)
        if module in FUNCTIONS and callable(found):
            return found
        if module == "torch" and found in (torch.device, torch.Size):
            return found
        if isinstance(found, type) and (issubclass(found, nn.Module) or module.startswith("lssl.")):
            return found
        what = "does not exist here" if found is None else "is not needed to build a network"
        raise InputError(f"{self.path} names {module}.{name}, which {what}.")

    def persistent_load(self, pid: Any) -> Any:
        """Makes what :class:`_Writer` replaced."""
        if pid[0] in ("none", "generator"):
            return None if pid[0] == "none" else torch.Generator()
        if pid[0] == "torch":
            value = getattr(torch, pid[1])
            if not isinstance(value, torch.dtype | torch.memory_format):
                raise pickle.UnpicklingError(f"torch.{pid[1]} is no value")
            return value
        kind, number, dtype, shape, requires_grad, kept = pid
        if number not in self.made:
            of = getattr(torch, dtype)
            if kept is None or not math.prod(shape):
                tensor = torch.zeros(shape, dtype=of)
            else:
                tensor = torch.frombuffer(bytearray(kept), dtype=of).reshape(shape)
            self.made[number] = nn.Parameter(tensor, requires_grad) if kind == "parameter" else tensor
        return self.made[number]


def pack(module: nn.Module, dropped: Collection[Any] = ()) -> Tensor:
    """A module's structure as ``(bytes,)`` uint8.

    Args:
        module: what is packed; its weights and buffers are left out, as its state_dict has them.
        dropped: objects within it that become None.

    Raises:
        pickle.PicklingError, AttributeError, TypeError: for a module that holds a lambda or the like.
    """
    file = io.BytesIO()
    _Writer(
        file, {id(value) for value in module.state_dict(keep_vars=True).values()}, {id(one) for one in dropped}
    ).dump(module)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8).clone()


def unpack(packed: Tensor, path: str) -> Any:
    """The module of :func:`pack`, with zeros for its weights.

    Args:
        packed: its bytes.
        path: of the file that they come from, for messages.

    Raises:
        InputError: for a class that is not trusted, or bytes that are damaged.
    """
    try:
        return _Reader(io.BytesIO(packed.numpy().tobytes()), path).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError) as error:
        raise InputError(f"{path}: its network cannot be rebuilt here ({error}).") from None
