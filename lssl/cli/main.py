"""The command line: its commands, and how mistakes are shown.

``lssl fit --config FILE …`` is LightningCLI with the groups ``data``, ``views``, ``backbone``, ``model`` and
``trainer``. Heavy imports wait until a command needs them, so that ``lssl --help`` answers at once.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys

from lssl.cli.help import COMMANDS, HELP, command_help
from lssl.cli.versions import print_versions
from lssl.utils.errors import InputError, input_error, nearest
from lssl.utils.stop import StopSignals

__all__ = ["main"]

LIGHT_COMMANDS = {
    "prepare": "lssl.prepare.commands:prepare_command",
    "inspect": "lssl.prepare.commands:inspect_command",
    "import": "lssl.prepare.migrate:import_command",
    "show": "lssl.runs.show:show_command",
    "tune": "lssl.cli.tune:tune_command",
    "profile": "lssl.cli.profile:profile_command",
    "benchmark": "lssl.benchmark.command:benchmark_command",
    "export": "lssl.export.command:export_command",
    "segment": "lssl.cli.segment:segment_command",
    "trajectories": "lssl.trajectories.command:trajectories_command",
    "completion": "lssl.cli.completion:completion_command",
}
GROUPS = ("strategies", "datamodules")


def main(args: list[str] | None = None) -> None:
    """Runs one command; a user's mistake is shown as one sentence, with exit status 2.

    A signal ends it with one sentence and the signal's status, unless the command takes the signal over.

    Args:
        args: as on the command line, without the program's name; ``None`` takes ``sys.argv``.
    """
    with StopSignals():
        _run(sys.argv[1:] if args is None else list(args))


def _run(args: list[str]) -> None:
    command = args[0] if args else "--help"
    try:
        if command in ("-h", "--help", "help"):
            print(HELP)
        elif command in ("-V", "--version"):
            print_versions()
        elif command in GROUPS:
            _describe(command, args[1:])
        elif command in LIGHT_COMMANDS:
            room, _, name = LIGHT_COMMANDS[command].partition(":")
            getattr(importlib.import_module(room), name)(args[1:])
        elif command in COMMANDS:
            if {"-h", "--help"} & {*args}:
                print(command_help(command))
            else:
                from lssl.cli.start import train

                train(command, args[1:])
        else:
            raise InputError(
                f"There is no command '{command}'{nearest(command, [*COMMANDS, *LIGHT_COMMANDS, *GROUPS])}"
            )
        sys.stdout.flush()
    except BrokenPipeError:  # lssl strategies | head
        if command in COMMANDS:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing is said at exit
        raise SystemExit(128 + signal.SIGPIPE) from None
    except KeyboardInterrupt:
        print("\nlssl: stopped by Ctrl-C.", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        mistake = input_error(error)
        if mistake is None:
            raise
        print(f"lssl: error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None


def _describe(group: str, args: list[str]) -> None:
    """Lists the classes of a group, or describes those that are named."""
    from lssl.cli import describe

    if {"-h", "--help"} & {*args}:
        print(f"lssl {group} [NAME]\n\nLists the {group}, or describes one: its options, paper and recipes.")
    elif unknown := [name for name in args if name.startswith("-")]:
        raise InputError(f"lssl {group} has no option {unknown[0]}; type lssl {group} [NAME].")
    elif not args:
        describe.list_classes(group)
    for name in args if not any(name.startswith("-") for name in args) else ():
        describe.describe_class(group, name)
