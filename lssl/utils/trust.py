"""Which classes a config inside a file may name: a checkpoint can come from anyone, and importing a module runs it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from types import FunctionType
from typing import Any

from torch import nn

from lssl.utils.errors import InputError

__all__ = ["check_classes", "refuse_commands"]

#: Where classes come from that a network or a method is built of. Classes elsewhere in lssl write files or start runs.
ROOMS = ("strategies", "losses", "metrics", "networks", "views", "correspondence", "segmentation", "strategy", "task")
LIBRARIES = (*(f"lssl.{room}" for room in ROOMS), "monai.networks", "monai.losses", "torch.nn")
FACTORIES = ("lssl.networks", "monai.networks.nets", "torch.nn.functional")  # where functions count as well
GROUPS = ("lssl.strategies", "lssl.datamodules")
VARIABLE = "LSSL_TRUST"  # further modules, separated by commas
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def check_classes(config: Any, file: str) -> None:
    """Refuses a config that names a class which importing a stranger's file must not import.

    Allowed are what builds networks and methods of lssl, MONAI's networks and losses, ``torch.nn``, installed plugins
    (entry points), modules that ``LSSL_TRUST`` lists, and networks of modules that this process has imported already.
    What counts is where a class was made: ``lssl.utils.files.os.system`` begins like one of lssl, and
    ``pandas.read_pickle`` is imported. A config that the user names on the command line is not checked: whoever writes
    a command is trusted.

    Args:
        config: nested mappings and lists.
        file: where it was found, for the message.

    Raises:
        InputError: if another module is named, as a ``class_path`` or as a plain text that can be imported.
    """
    for key, text in _texts(config):
        if not DOTTED.fullmatch(text) or _trusted(text):
            continue
        if key != "class_path" and not _importable(text):  # a file or the like
            continue
        module = text.rpartition(".")[0]
        raise InputError(
            f"{file} names the class {text}, which is no part of a network or method of lssl, MONAI, torch or an "
            f"installed plugin; using it runs its code. If you trust the file, set "
            f"{VARIABLE}={module.partition('.')[0]} in the environment, or import {module} first."
        )


def refuse_commands(config: Any) -> None:
    """Refuses a ``class_path`` that is no class and does not say what it makes, such as ``os.system``.

    Whoever writes a config is trusted, but a function under ``class_path`` is called before its result is looked at.
    Classes pass, and functions with a return annotation, as :func:`lssl.networks.backbone.unet`.

    Args:
        config: nested mappings and lists.

    Raises:
        InputError: that names the function.
    """
    for key, text in _texts(config):
        if key != "class_path" or not DOTTED.fullmatch(text):
            continue
        found = _found(text)
        if (
            found is not None
            and not isinstance(found, type)
            and not getattr(found, "__annotations__", {}).get("return")
        ):
            raise InputError(
                f"class_path: {text} is no class, and does not say what it returns; name a class, or a function with a "
                "return annotation."
            )


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text with its key; paths of taps are submodules of the network and are left out."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name != "taps":
                yield from _texts(value, str(name))
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _texts(value, key)
    elif isinstance(node, str):
        yield key, node


def _trusted(text: str) -> bool:
    plugins = {
        point.value.partition(".")[0].partition(":")[0] for group in GROUPS for point in entry_points(group=group)
    }
    named = {name.strip() for name in os.environ.get(VARIABLE, "").split(",")} - {""}
    others = (plugins - {"lssl"}) | named
    root = text.partition(".")[0]
    installed = root in sys.stdlib_module_names or root in {"torch", "monai", "lightning", "numpy"}
    there = not installed and text.rpartition(".")[0] in sys.modules
    if not there and not _within(text, ("lssl", *LIBRARIES, *others)):
        return False
    found = _found(text)
    origin = str(getattr(found, "__module__", ""))
    if found is None or _within(origin, others):
        return True  # what is not there cannot be called
    if isinstance(found, type):
        return _within(origin, LIBRARIES) or issubclass(found, nn.Module)
    return isinstance(found, FunctionType) and _within(origin, FACTORIES)


def _within(text: str, modules: Iterable[str]) -> bool:
    return any(f"{text}.".startswith(f"{module}.") for module in modules)


def _found(text: str) -> Any:
    """What a parser would find under this name: attributes of attributes of the longest name that is a module."""
    parts = text.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found
    return None


def _importable(text: str) -> bool:
    try:
        return importlib.util.find_spec(text.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False
