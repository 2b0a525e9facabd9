"""The command line of ``lssl fit | validate | test | predict`` as files, data and options; nothing is resolved yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lssl.utils.errors import InputError

__all__ = ["Arguments", "asks_for_help", "read_arguments"]

SHOWS = ("config", "sources")


@dataclass
class Arguments:
    """The parsed arguments.

    Attributes:
        files: of ``--config``, in their order.
        data: of the last ``--data``.
        options: key and text of all other options, in their order.
        show: ``config`` or ``sources``, to print it instead of running.
    """

    files: list[str] = field(default_factory=list)
    data: str | None = None
    options: list[tuple[str, str]] = field(default_factory=list)
    show: str | None = None


def asks_for_help(args: Sequence[str]) -> bool:
    """Whether the parser's own help was requested: ``--help=all``, or ``--model.help CLASS``."""
    return any(arg.partition("=")[0] == "--help" or arg.partition("=")[0].endswith(".help") for arg in args)


def read_arguments(args: Sequence[str]) -> Arguments:
    """Reads ``--key value`` and ``--key=value``, in any order."""
    read, rest = Arguments(), list(args)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        if name == "--print_config":
            if (text or "config") not in SHOWS:
                raise InputError(f"--print_config={text} is unknown; give --print_config or --print_config=sources.")
            read.show = text or "config"
            continue
        if name != "-c" and not (name.startswith("--") and len(name) > 2):
            raise InputError(f"'{name}' stands alone; options are given as --key value or --key=value.")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"{name} needs a value: {name} VALUE, or {name}=VALUE.")
            text = rest.pop(0)
        if name in ("-c", "--config"):
            read.files.append(text)
        elif name == "--data" and not text.lstrip().startswith("{"):
            read.data = text
        else:
            read.options.append((name[2:], text))
    return read
