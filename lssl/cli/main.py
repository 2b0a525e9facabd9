"""The command line: the only room that knows all the others.

``lssl fit --config FILE …`` is LightningCLI with the groups ``data``, ``views``, ``backbone``, ``model`` and
``trainer``. Heavy imports wait until a command needs them, so that ``lssl --help`` answers at once.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from importlib.metadata import entry_points
from pathlib import Path

from lssl import __version__
from lssl.utils.allocator import keep_freed_memory
from lssl.utils.errors import InputError, input_error, nearest

__all__ = ["main", "shipped_config"]

HELP = f"""\
lssl {__version__}: self-supervised pretraining on longitudinal 3D neuroimages

  lssl fit      --config FILE [--config FILE …] [--key value …]    pretrain, or fine-tune a Segmenter
  lssl validate --config FILE --ckpt_path FILE|best|last           terms on held-out pairs; a Segmenter's Dice
  lssl test     --config FILE --ckpt_path FILE|best|last           terms on test pairs; a Segmenter's scores
  lssl predict  --config FILE --ckpt_path FILE|best|last           embeddings of every visit; a Segmenter's label maps
  lssl show     RUN [RUN …]                                        what runs logged: tables, curves, side by side
  lssl prepare  BIDS_DIR OUT_DIR [--suffix T1w …] [--workers N]    registered, cached visits from a BIDS folder
  lssl inspect  DIR [--json] [--sheet FILE.png]                    what a BIDS or prepared folder holds
  lssl benchmark --config FILE [--dry-run] [--jobs N] [--report]   strategies side by side, in one table
  lssl strategies                                                  the methods, one line each
  lssl datamodules                                                 the sources of pairs, one line each

  lssl fit --help                all options of a command
  lssl fit --config FILE --print_config    what FILE resolves to
  lssl --version

Later configs and options override earlier ones. A config that is no file here is looked for among the shipped ones,
so that `--config configs/demo.yaml` works from any folder."""

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
LIGHT_COMMANDS = {
    "prepare": "lssl.prepare.commands:prepare_command",
    "inspect": "lssl.prepare.commands:inspect_command",
    "show": "lssl.runs.show:show_command",
    "benchmark": "lssl.benchmark.command:benchmark_command",
}
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
        elif command in LIGHT_COMMANDS:
            room, _, name = LIGHT_COMMANDS[command].partition(":")
            getattr(importlib.import_module(room), name)(args[1:])
        elif command in TRAINER_COMMANDS:
            _train([command, *_with_files(_with_shipped_configs(args[1:]))])
        else:
            raise InputError(
                f"There is no command '{command}'{nearest(command, [*TRAINER_COMMANDS, *LIGHT_COMMANDS, *GROUPS])}"
            )
    except Exception as error:
        mistake = input_error(error)
        if mistake is None:
            raise
        print(f"lssl: error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None


def _list_classes(group: str) -> None:
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        line = (point.load().__doc__ or "").strip().splitlines()
        print(f"{point.name:<24}{line[0] if line else ''}")


def _with_shipped_configs(args: list[str]) -> list[str]:
    """Replaces a config that does not exist by the shipped one of that name."""
    resolved = list(args)
    for place, arg in enumerate(args):
        before, equals, path = arg.partition("=")
        if before not in ("--config", "-c") or (not equals and place + 1 == len(args)):
            continue
        ours = str(shipped_config(path if equals else args[place + 1]))
        if equals:
            resolved[place] = f"{before}={ours}"
        else:
            resolved[place + 1] = ours
    return resolved


def shipped_config(path: str) -> Path:
    """A config file; one that does not exist is looked for among the shipped ones."""
    if Path(path).is_file():
        _check_yaml(Path(path))
        return Path(path)
    package = Path(__file__).parents[1]
    shipped = package / "configs"
    shipped = shipped if shipped.is_dir() else package.parent / "configs"
    ours = shipped.joinpath(*[part for part in Path(path).parts if part != "configs"])
    if not ours.is_file():
        names = [f"configs/{p.relative_to(shipped)}" for p in shipped.rglob("*.yaml")]
        raise InputError(f"There is no config {path}{nearest(path, names)}")
    return ours


def _with_files(args: list[str]) -> list[str]:
    """Where a config's data are phantoms (also by default), a root given beside it names files instead of them."""
    import yaml

    given = [arg.partition("=")[0] for arg in args]
    if "--data.init_args.root" not in given or {"--data", "--data.class_path"} & {*given}:
        return args
    paths = [args[place + 1] if arg in ("--config", "-c") else arg.partition("=")[2] for place, arg in enumerate(args)
             if arg.partition("=")[0] in ("--config", "-c")]  # fmt: skip
    configs = [yaml.safe_load(Path(path).read_text()) or {} for path in paths]
    classes = [config["data"]["class_path"] for config in configs if "class_path" in (config.get("data") or {})]
    if classes and not classes[-1].endswith("PhantomDataModule"):
        return args
    place = given.index("--data.init_args.root")
    return [*args[:place], "--data.class_path=NiftiDataModule", *args[place:]]


def _check_yaml(path: Path) -> None:
    """The parser would not say which file is broken."""
    import yaml

    try:
        yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def _train(args: list[str]) -> None:
    """Hands over to LightningCLI, with every registered method and source importable by its short name."""
    _hush()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's own my_methods.py beside the config
    classes = [point.load() for group in GROUPS.values() for point in entry_points(group=group)]
    from lssl.cli.training import TrainingCLI

    keep_freed_memory()
    TrainingCLI.run(args, classes)


class _Chatter(logging.Filter):
    """Drops advertisements and notes on hardware that is not there."""

    NOISE = ("💡", "TPU available", "HPU available", "`weights_only`", "IPU available")

    def filter(self, record: logging.LogRecord) -> bool:
        """False for noise."""
        return not record.getMessage().startswith(self.NOISE)


def _hush() -> None:
    connector = "lightning.pytorch.trainer.connectors.checkpoint_connector"
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero", connector):
        logging.getLogger(name).addFilter(_Chatter())
    for message in (
        ".*does not have many workers.*",
        ".*number of training batches .* is smaller than the logging interval.*",
        "LightningCLI's args parameter is intended.*",
        ".*isinstance.treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message=message)
