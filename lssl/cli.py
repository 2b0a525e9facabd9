"""The command line: the only room that knows all the others.

``lssl fit --config FILE …`` is LightningCLI with the groups ``data``, ``views``, ``backbone``, ``model`` and
``trainer``. Heavy imports wait until a command needs them, so that ``lssl --help`` answers at once.
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from lssl import __version__
from lssl.errors import InputError

if TYPE_CHECKING:
    pass

__all__ = ["main"]

HELP = f"""\
lssl {__version__}: self-supervised pretraining on longitudinal 3D neuroimages

  lssl fit      --config FILE [--config FILE …] [--key value …]    pretrain
  lssl validate --config FILE --ckpt_path FILE|best|last           terms on held-out pairs
  lssl test     --config FILE --ckpt_path FILE|best|last           terms on test pairs
  lssl predict  --config FILE --ckpt_path FILE|best|last           embeddings of every visit
  lssl strategies                                                  the methods, one line each
  lssl datamodules                                                 the sources of pairs, one line each

  lssl fit --help                all options of a command
  lssl fit --config FILE --print_config    what FILE resolves to
  lssl --version

Later configs and options override earlier ones. A config that is no file here is looked for among the shipped ones,
so that `--config configs/demo.yaml` works from any folder."""

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
GROUPS = {"strategies": "lssl.strategies", "datamodules": "lssl.datamodules"}


def main(args: list[str] | None = None) -> None:
    """Runs one command; a mistake of the user ends in one sentence and exit status 2.

    Args:
        args: as on the command line, without the program's name; ``None`` takes ``sys.argv``.
    """
    args = sys.argv[1:] if args is None else list(args)
    command = args[0] if args else "--help"
    try:
        if command in ("-h", "--help", "help"):
            print(HELP)
        elif command in ("-V", "--version"):
            print(__version__)
        elif command in GROUPS:
            _list_classes(GROUPS[command])
        elif command in TRAINER_COMMANDS:
            _train([command, *_with_shipped_configs(args[1:])])
        else:
            raise InputError(f"There is no command '{command}'{_nearest(command, [*TRAINER_COMMANDS, *GROUPS])}.")
    except InputError as error:
        print(f"lssl: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _nearest(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else f"; there are {', '.join(sorted(known))}"


def _list_classes(group: str) -> None:
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        line = (point.load().__doc__ or "").strip().splitlines()
        print(f"{point.name:<24}{line[0] if line else ''}")


def _with_shipped_configs(args: list[str]) -> list[str]:
    """Replaces a config that does not exist by the shipped one of that name."""
    shipped = Path(__file__).parent / "configs"
    shipped = shipped if shipped.is_dir() else Path(__file__).parents[1] / "configs"
    resolved = list(args)
    for place, arg in enumerate(args):
        before, equals, path = arg.partition("=")
        if before not in ("--config", "-c") or (not equals and place + 1 == len(args)):
            continue
        path = path if equals else args[place + 1]
        if Path(path).is_file():
            continue
        ours = shipped.joinpath(*[part for part in Path(path).parts if part != "configs"])
        if not ours.is_file():
            names = [f"configs/{p.relative_to(shipped)}" for p in shipped.rglob("*.yaml")]
            raise InputError(f"There is no config {path}{_nearest(path, names)}.")
        if equals:
            resolved[place] = f"{before}={ours}"
        else:
            resolved[place + 1] = str(ours)
    return resolved


def _train(args: list[str]) -> None:
    """Hands over to LightningCLI, with every registered method and source importable by its short name."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*number of training batches .* is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's own my_methods.py beside the config
    from jsonargparse import ArgumentError

    for group in GROUPS.values():
        for point in entry_points(group=group):
            point.load()
    from lssl.training import TrainingCLI

    try:
        TrainingCLI.run(args)
    except ArgumentError as error:
        raise InputError(_sentence(error)) from None


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())
