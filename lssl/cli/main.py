"""The command line: its commands, and how mistakes are shown.

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

from lssl import __version__
from lssl.utils.allocator import keep_freed_memory
from lssl.utils.errors import InputError, input_error, nearest

__all__ = ["main"]

HELP = f"""\
lssl {__version__}: self-supervised pretraining on longitudinal 3D neuroimages

  lssl fit      --config NAME --data PATH [--key value …]          pretrain, or fine-tune a Segmenter
  lssl validate --config NAME --ckpt_path FILE|best|last           terms on held-out pairs; a Segmenter's Dice
  lssl test     --config NAME --ckpt_path FILE|best|last           terms on test pairs; a Segmenter's scores
  lssl predict  --config NAME --ckpt_path FILE|best|last           embeddings of every visit; a Segmenter's label maps
  lssl show     RUN [RUN …]                                        what runs logged: tables, curves, side by side
  lssl prepare  BIDS_DIR OUT_DIR [--suffix T1w …] [--workers N]    registered, cached visits from a BIDS folder
  lssl inspect  DIR [--json] [--sheet FILE.png]                    what a BIDS or prepared folder holds
  lssl import   FILE OUT [--spacing MM]                            a table of visits from nnssl's JSON or an HDF5 file
  lssl benchmark --config NAME [--dry-run] [--jobs N] [--report]   strategies side by side, in one table
  lssl export   RUN OUT [--to monai|nnunet|safetensors|onnx]       weights for other programs, verified without lssl
  lssl strategies                                                  the methods, one line each
  lssl datamodules                                                 the sources of pairs, one line each

  NAME    a config file, or a shipped recipe: longitudinal_local, finetune, benchmark/demo; later ones override earlier
  PATH    a prepared folder, a BIDS folder, a table of visits (CSV) or one NIfTI file; or a class: PhantomDataModule

  lssl fit --help                          all options of a command
  lssl fit --config NAME --print_config    what NAME resolves to; --print_config=sources says where each value is from
  lssl --version

Options override --data, and --data overrides configs, in any order of the arguments."""

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
LIGHT_COMMANDS = {
    "prepare": "lssl.prepare.commands:prepare_command",
    "inspect": "lssl.prepare.commands:inspect_command",
    "import": "lssl.prepare.migrate:import_command",
    "show": "lssl.runs.show:show_command",
    "benchmark": "lssl.benchmark.command:benchmark_command",
    "export": "lssl.export.command:export_command",
}
GROUPS = {"strategies": "lssl.strategies", "datamodules": "lssl.datamodules"}


def main(args: list[str] | None = None) -> None:
    """Runs one command; a user's mistake is shown as one sentence, with exit status 2.

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
            _train(command, args[1:])
        else:
            raise InputError(
                f"There is no command '{command}'{nearest(command, [*TRAINER_COMMANDS, *LIGHT_COMMANDS, *GROUPS])}"
            )
    except KeyboardInterrupt:
        print("\nlssl: stopped by Ctrl-C.", file=sys.stderr)
        raise SystemExit(130) from None
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


def _train(command: str, args: list[str]) -> None:
    """Hands over to LightningCLI."""
    _hush()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's own my_methods.py beside the config
    from lssl.cli.training import TrainingCLI

    keep_freed_memory()
    TrainingCLI.run(command, args)


class _Chatter(logging.Filter):
    """Drops advertisements and notes on absent hardware."""

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
        ".*isinstance.treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message=message)
