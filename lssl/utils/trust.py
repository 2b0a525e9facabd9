"""Which classes a config inside a file may name: a checkpoint can come from anyone, and importing a module runs it."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from lssl.utils.errors import InputError

__all__ = ["check_classes"]

LIBRARIES = ("lssl", "monai.networks", "monai.losses", "torch.nn")
GROUPS = ("lssl.strategies", "lssl.datamodules")
VARIABLE = "LSSL_TRUST"  # further modules, separated by commas
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def check_classes(config: Any, file: str) -> None:
    """Refuses a config that names a class which importing a stranger's file must not import.

    Allowed are lssl, MONAI's networks and losses, ``torch.nn``, installed plugins (entry points), modules that this
    process has imported already, and those that the environment variable ``LSSL_TRUST`` lists. A config that the user
    names on the command line is not checked: whoever writes a command is trusted.

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
            f"{file} names the class {text}, which is neither of lssl, MONAI or torch nor of an installed plugin; "
            f"importing it runs its code. If you trust the file, set {VARIABLE}={module.partition('.')[0]} in the "
            f"environment, or import {module} first."
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
    if any(text.startswith(f"{module}.") for module in (*LIBRARIES, *plugins, *named)):
        return True
    root = text.partition(".")[0]
    installed = root in sys.stdlib_module_names or root in {"torch", "monai", "lightning", "numpy"}
    return (
        not installed and text.rpartition(".")[0] in sys.modules
    )  # these are always imported, and hold more than networks


def _importable(text: str) -> bool:
    try:
        return importlib.util.find_spec(text.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False
