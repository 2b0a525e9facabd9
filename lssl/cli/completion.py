"""``lssl completion bash|zsh|fish``: a script by which a shell completes commands, options, configs and names.

The names are those of the moment, third parties' too. ``eval "$(lssl completion bash)"`` in ``~/.bashrc`` keeps them
new. Libraries for this (shtab, argcomplete) take options from an argparse parser; ours of ``fit`` imports Lightning,
and ``--config`` takes shipped names as well as files.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib import import_module

from lssl.cli.describe import registered_names
from lssl.cli.help import COMMANDS, OPTIONS
from lssl.cli.registered import TASKS
from lssl.prepare.commands import Parser
from lssl.utils.errors import InputError, nearest

__all__ = ["completion_command", "words"]

SHELLS = ("bash", "zsh", "fish")
#: The parser of each command that has one.
PARSERS = {
    "prepare": "lssl.prepare.commands:prepare_parser",
    "inspect": "lssl.prepare.commands:inspect_parser",
    "import": "lssl.prepare.migrate:import_parser",
    "show": "lssl.runs.show:show_parser",
    "tune": "lssl.cli.tune:tune_parser",
    "profile": "lssl.cli.profile:profile_parser",
    "benchmark": "lssl.benchmark.command:benchmark_parser",
    "export": "lssl.export.command:export_parser",
    "segment": "lssl.cli.segment:segment_parser",
    "trajectories": "lssl.trajectories.command:trajectories_parser",
}
MEASURING = ("tune", "profile")  # they take the options of fit beside their own
VALUES = {"ckpt_path": ("best", "last"), "print_config": ("sources",), "trainer.precision": ("32-true", "bf16-mixed")}


def completion_command(args: Sequence[str]) -> None:
    """Runs ``lssl completion``.

    Args:
        args: the shell.
    """
    parser = Parser(prog="lssl completion", description="Prints a script that completes lssl's commands in a shell.")
    parser.add_argument("shell", metavar="bash|zsh|fish", help='use it by eval "$(lssl completion bash)" in ~/.bashrc')
    shell = parser.parse_args(list(args)).shell
    if shell not in SHELLS:
        raise InputError(f"There is no completion for {shell}{nearest(shell, SHELLS)}")
    first, after = words()
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](first, after))


def words() -> tuple[list[str], dict[str, list[str]]]:
    """The commands, and the words that may follow ``COMMAND`` or ``COMMAND --option``."""
    from lssl.cli.compose import shipped_folder

    configs = sorted(
        str(path.relative_to(shipped_folder()).with_suffix("")) for path in shipped_folder().rglob("*.yaml")
    )
    classes = {group: registered_names(group) for group in ("strategies", "datamodules")}
    values: Mapping[str, Sequence[str]] = {
        **VALUES,
        "config": configs,
        "data": classes["datamodules"],
        "model": [*classes["strategies"], *(f"lssl.{name}" for name in TASKS)],
    }
    after: dict[str, list[str]] = {"completion": list(SHELLS), **classes}
    after["strategies"] = [*classes["strategies"], *TASKS]
    for command in COMMANDS:
        after[command] = [f"--{name}" for name in OPTIONS]
        after |= {f"{command} --{name}": list(values[name]) for name in OPTIONS if name in values}
    for command, place in PARSERS.items():
        module, _, name = place.partition(":")
        after |= _of_parser(command, getattr(import_module(module), name)())
    for command in MEASURING:
        after[command] += after["fit"]
        after |= {f"{command} {key[4:]}": found for key, found in after.items() if key.startswith("fit --")}
    after["benchmark --config"] = [name for name in configs if name.startswith("benchmark/")]
    return sorted({*after.keys()} & {*COMMANDS, *PARSERS, *classes, "completion"}), after


def _of_parser(command: str, parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    after = {command: [name for action in parser._actions for name in action.option_strings if name.startswith("--")]}
    for action in parser._actions:
        for name in action.option_strings if action.choices else ():
            after[f"{command} {name}"] = [str(choice) for choice in action.choices or ()]
    return after


def _bash(first: Sequence[str], after: Mapping[str, Sequence[str]]) -> str:
    """Names come before files, which the shell completes itself; ``--key=value`` is left to it."""
    cases = "\n".join(f"        '{key}') offered='{' '.join(found)}' ;;" for key, found in after.items())
    return f"""\
_lssl() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" command="${{COMP_WORDS[1]}}"
    local offered='' key="$command"
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W '{" ".join(first)} --help --version' -- "$current"))
        return
    fi
    case "$before" in --*) key="$command $before" ;; esac
    case "$current" in -*) key="$command" ;; esac
    case "$key" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$offered" -- "$current"))
    case "$current" in -*) ;; *) COMPREPLY+=($(compgen -f -- "$current")) ;; esac
}}
complete -o filenames -o bashdefault -F _lssl lssl"""


def _zsh(first: Sequence[str], after: Mapping[str, Sequence[str]]) -> str:
    """The same through zsh's own functions."""
    cases = "\n".join(f"        '{key}') offered=({' '.join(found)}) ;;" for key, found in after.items())
    return f"""\
#compdef lssl
_lssl() {{
    local current="${{words[CURRENT]}}" before="${{words[CURRENT-1]}}" command="${{words[2]}}"
    local key="$command"
    local -a offered
    if (( CURRENT == 2 )); then
        compadd -- {" ".join(first)} --help --version
        return
    fi
    case "$before" in --*) key="$command $before" ;; esac
    case "$current" in -*) key="$command" ;; esac
    case "$key" in
{cases}
    esac
    compadd -a offered
    case "$current" in -*) ;; *) _files ;; esac
}}
if ! type compdef >/dev/null 2>&1; then
    autoload -Uz compinit && compinit
fi
compdef _lssl lssl"""


def _fish(first: Sequence[str], after: Mapping[str, Sequence[str]]) -> str:
    """A line for each list of words; fish offers files beside them. Without ``-r`` an option would take no value."""
    lines = [f"complete -c lssl -n __fish_use_subcommand -f -a '{' '.join(first)}'"]
    for key, found in after.items():
        command, _, option = key.partition(" --")
        seen = f"-n '__fish_seen_subcommand_from {command}'"
        if option:
            lines.append(f"complete -c lssl {seen} -l '{option}' -r -a '{' '.join(found)}'")
        else:
            lines.append(f"complete -c lssl {seen} -a '{' '.join(found)}'")
    return "\n".join(lines)
