"""LightningCLI over strategies, data, backbone and views; imported only when a command trains or evaluates."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import Callback, RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_warn

from lssl.callbacks import DataWait, EmbeddingWriter, RepresentationMonitor
from lssl.cli.messages import explain
from lssl.networks.backbone import Backbone
from lssl.runs.folder import RunFolder, back_up, checkpoint_path, new_run_folder, run_checkpoints
from lssl.segmentation.segmenter import Segmenter
from lssl.task import Task
from lssl.views.sampler import ViewSampler

__all__ = ["TrainingCLI"]


class TrainingCLI(LightningCLI):
    """Groups ``data``, ``views``, ``backbone``, ``model``, ``monitor`` and ``trainer``.

    Views and backbone are handed to the model.
    """

    @classmethod
    def run(cls, args: list[str], classes: Sequence[type] = ()) -> TrainingCLI:
        """Parses and runs one command.

        Args:
            args: the command and its options.
            classes: registered strategies and datamodules; they and what lies beside them are named when a name is
                wrong.
        """
        try:
            return cls._run(args)
        except ArgumentError as error:
            groups = {
                "trainer": L.Trainer,
                "views": ViewSampler,
                "backbone": Backbone,
                "monitor": RepresentationMonitor,
            }
            rooms = {sys.modules[cls.__module__] for cls in classes}
            known = {getattr(room, name) for room in rooms for name in getattr(room, "__all__", ())} | {
                *classes,
                Segmenter,
            }
            raise explain(error, groups, sorted(filter(inspect.isclass, known), key=lambda cls: cls.__name__)) from None

    @classmethod
    def _run(cls, args: list[str]) -> TrainingCLI:
        return cls(
            Task,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunFolder,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"parser_mode": "omegaconf", "exit_on_error": False, "allow_abbrev": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the groups that are ours, and the run folder's logger."""
        parser.add_class_arguments(Backbone, "backbone")
        parser.link_arguments("backbone", "model.init_args.backbone", apply_on="instantiate")
        parser.add_class_arguments(ViewSampler, "views")
        parser.link_arguments("views", "model.init_args.views", apply_on="instantiate")
        parser.add_lightning_class_args(RepresentationMonitor, "monitor")
        parser.set_defaults(
            {
                "data": {"class_path": "PhantomDataModule"},
                "trainer.default_root_dir": "runs/run",
                "trainer.logger": {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": "runs/run", "name": "", "version": ""},
                },
            }
        )

    def before_instantiate_classes(self) -> None:
        """Settles the run folder and the checkpoint to start from, before anything is built."""
        config = self.config[self.subcommand]
        folder = Path(config.trainer.default_root_dir)
        path = checkpoint_path(config.get("ckpt_path"), folder)
        if "ckpt_path" in config:
            config.ckpt_path = path
        if self.subcommand == "predict":
            _forget_labels(config)
        logs = folder
        if self.subcommand == "fit":
            logs = folder = new_run_folder(folder, resuming=path is not None)
        else:  # evaluation leaves the run's own metrics alone
            logs = folder / str(self.subcommand)
            back_up(logs / "metrics.csv")
            if path is None:
                rank_zero_warn(f"lssl {self.subcommand} without --ckpt_path: the network's weights are untrained.")
        config.trainer.default_root_dir = str(folder)
        loggers = config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            arguments = getattr(logger, "init_args", None)
            if arguments is not None and "save_dir" in arguments:
                arguments.save_dir = str(logs)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Adds the progress bar and the checkpoints of the run folder to whatever callbacks are configured."""
        config = self.config[self.subcommand].trainer
        folder = Path(config.default_root_dir)
        callbacks: list[Callback] = [EmbeddingWriter(folder), DataWait()]
        if config.enable_checkpointing is not False:
            callbacks += run_checkpoints(folder)
        if config.enable_progress_bar is not False:
            callbacks.append(RichProgressBar() if sys.stdout.isatty() else TQDMProgressBar(refresh_rate=20))
        self.trainer_defaults["callbacks"] = callbacks
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """A resumed run has its own weights, and need not find those that it once started from."""
        if self.config.fit.get("ckpt_path"):
            self.model.on_resume()


def _forget_labels(config: Any) -> None:
    """Prediction needs no labels, and the folder it is given need not have any."""
    if "labels" in config.data.get("init_args", {}):
        config.data.init_args.labels = None
