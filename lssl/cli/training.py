"""LightningCLI over strategies, data, backbone and views; imported only when a command trains or evaluates."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lssl.callbacks import (
    Account,
    AutoSave,
    EmbeddingWriter,
    Progress,
    RepresentationMonitor,
    Summary,
    Trace,
    WithinMemory,
)
from lssl.checkpoint import read_checkpoint
from lssl.cli.arguments import asks_for_help, read_arguments
from lssl.cli.complete import at, complete, refuse_missing_weights
from lssl.cli.compose import Config, sources_of
from lssl.cli.devices import chosen, refuse_sharding, spread
from lssl.cli.endings import say_ending
from lssl.cli.failures import explained, stop_launched
from lssl.cli.messages import refuse_unknown
from lssl.cli.references import from_environment, resolved
from lssl.cli.registered import registered
from lssl.cli.settings import check_settings, trainer_refusal
from lssl.networks.backbone import Backbone
from lssl.runs.checkpoint_io import AtomicCheckpointIO
from lssl.runs.folder import (
    CONFIG,
    RunFolder,
    back_up,
    checkpoint_path,
    leave,
    new_run_folder,
    resolved_text,
    run_checkpoints,
    written_into,
)
from lssl.runs.siblings import choose_run
from lssl.task import Task
from lssl.utils.errors import InputError, input_error
from lssl.utils.stop import StopSignals
from lssl.views.sampler import ViewSampler

__all__ = ["TrainingCLI"]


NO_DATA = (
    "There is no data; give --data PATH (a prepared folder, a BIDS folder, a table of visits or one NIfTI file), "
    "--data CLASS (PhantomDataModule draws heads and needs no files), or a config with data: in it."
)

OF_THE_NETWORK, OF_THE_TRAINING = (
    ("model", "backbone", "views"),
    ("data", "seed_everything"),
)  # what runs share to be one


class TrainingCLI(LightningCLI):
    """Groups ``data``, ``views``, ``backbone``, ``model``, ``monitor`` and ``trainer``.

    Views and backbone are passed to the model.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        config: its settings; ``None`` shows the help requested in ``args``.
        args: the options, for help.
        show: prints the ``config`` or the ``sources`` of its values, and exits.
        ending: takes what is to be done when the run ends; ``None`` only checks the config and runs nothing.
    """

    without: Any = None

    def __init__(
        self,
        command: str,
        config: Config | None,
        args: Sequence[str] = (),
        show: str | None = None,
        ending: ExitStack | None = None,
    ) -> None:
        self.command, self.composed, self.show = command, config or Config(), show
        self.runs, self.ending = ending is not None or config is None, ending or ExitStack()
        self.signals, self.memory = StopSignals(), WithinMemory()
        if ending is not None:
            ending.enter_context(self.signals)
        values = resolved(self.composed.values)
        if config is not None and not at(values, "data", "class_path"):
            if not show:
                raise InputError(NO_DATA)
            self.without = values.pop("data", None)  # a recipe without data can be shown, but not run
        super().__init__(
            Task,
            subclass_mode_model=True,
            save_config_callback=RunFolder,
            save_config_kwargs={"references": from_environment(self.composed.values)},
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            args=[command, *args] if config is None else {"subcommand": command, command: values},
        )

    def __getstate__(self) -> dict[str, Any]:
        """What is to be done when the run ends is left to this process."""
        return {**self.__dict__, "ending": ExitStack()}

    @classmethod
    def run(cls, command: str, args: Sequence[str]) -> L.Trainer | None:
        """Runs one command with its arguments, and returns its trainer; ``None`` if it showed help.

        Args:
            command: its name.
            args: its options.
        """
        classes = registered()
        if asks_for_help(args):
            with explained(classes):
                cls(command, None, ["--help" if arg.startswith("--help=") else arg for arg in args])
            return None
        given = read_arguments(args)
        config = complete(given.files, given.data, given.options)
        with explained(classes), ExitStack() as ending:
            cli = cls(command, config, show=given.show, ending=ending)
        if cli.trainer.is_global_zero and not cli.trainer.interrupted:
            say_ending(command, args, cli.trainer, cli.model, cli.datamodule)
        return cli.trainer

    @classmethod
    def check(cls, config: Config) -> None:
        """Checks that ``lssl fit`` can read a config; builds nothing."""
        with explained(registered()), suppress(SystemExit):
            cls("fit", config)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that was asked for alone: building the parser of one takes 0.1 s."""
        return {self.command: super().subcommands()[self.command]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses; prints the config and exits if requested."""
        if isinstance(args, dict):
            known = self._parser(self.command).get_defaults().as_dict()
            refuse_unknown(args[self.command], known, ("backbone", "monitor", "trainer", "views"))
            self.config = parser.parse_object(args)
        else:  # for help
            self.config = parser.parse_args(args)
        if self.show == "config":
            print(self._dump(), end="")
        elif self.show == "sources":
            print("\n".join(sources_of(yaml.safe_load(self._dump()), self.composed.sources)))
        if self.show or not self.runs:
            raise SystemExit(0)
        if self.composed.found:
            options = self.composed.values["data"]["init_args"]
            rank_zero_info(self.composed.found.sentence(options.get("suffix", "T1w")))

    def _dump(self) -> str:
        references = self.save_config_kwargs["references"]
        text = resolved_text(self._parser(self.command), self.config[self.command], references)
        return (
            text
            if self.without is None
            else yaml.safe_dump(yaml.safe_load(text) | {"data": self.without}, sort_keys=False)
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the groups of lssl and the run folder's logger."""
        parser.add_class_arguments(Backbone, "backbone")
        parser.link_arguments("backbone", "model.init_args.backbone", apply_on="instantiate")
        parser.add_class_arguments(ViewSampler, "views")
        parser.link_arguments("views", "model.init_args.views", apply_on="instantiate")
        parser.add_lightning_class_args(RepresentationMonitor, "monitor")
        parser.add_argument(
            "--max_lost",
            type=float | None,
            default=10.0,
            help="minutes of training that a killed run loses at most; null saves at the end of epochs alone",
        )
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs/run",
                "trainer.logger": {
                    "class_path": "lssl.runs.loggers.RunCSVLogger",
                    "init_args": {"save_dir": "runs/run", "name": "", "version": ""},
                },
            }
        )

    def before_instantiate_classes(self) -> None:
        """Resolves the run folder and the initial checkpoint, before anything is built."""
        self.ending.enter_context(self.memory)
        config = self.config[self.subcommand]
        refuse_sharding(config.trainer.strategy, config.trainer.sync_batchnorm, config.backbone.compile)
        check_settings(str(self.subcommand), config.trainer, config.get("max_lost"))
        folder = self._folder(config)
        path = checkpoint_path(config.get("ckpt_path"), folder)
        if path is not None and config.ckpt_path not in ("best", "last"):
            read_checkpoint(path)  # refuses a file of other software
        if "ckpt_path" in config:
            config.ckpt_path = path
        logs = folder
        if self.subcommand == "fit":
            if path is None:
                refuse_missing_weights(config.model.class_path, config.get("model.init_args.pretrained"))
            self.claim = claim = new_run_folder(folder, path)
            self.ending.push(written_into(claim.folder))
            self.ending.push(leave(claim))
            self.save_config_kwargs["claim"] = claim
            logs = folder = claim.folder
            config.ckpt_path = path = claim.checkpoint
        else:  # evaluation does not change the run's own metrics
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

    def _folder(self, config: Any) -> Path:
        """The run folder.

        With a checkpoint, it is that of the config file if it was moved with its config, or the newest of several runs.
        """
        folder, source = Path(config.trainer.default_root_dir), ("trainer", "default_root_dir")
        file = Path(self.composed.sources.get(source, ""))
        moved = file.name == CONFIG and (file.parent / "checkpoints").is_dir() and not folder.exists()
        given = config.get("ckpt_path")
        if moved and given:
            rank_zero_info(f"The run folder {folder} was moved to {file.parent}.")
            return file.parent
        if given not in ("best", "last"):
            return folder
        named = file.name == CONFIG and file.parent.resolve() == folder.resolve()
        groups = OF_THE_NETWORK + (OF_THE_TRAINING if self.subcommand == "fit" else ())
        settings = yaml.safe_load(self._dump())
        return choose_run(folder, given, {key: settings.get(key) for key in groups}, named)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Adds the progress bar and the checkpoints of the run folder to the configured callbacks."""
        config = self.config[self.subcommand].trainer
        folder = Path(config.default_root_dir)
        callbacks: list[Callback] = [EmbeddingWriter(), Account(), self.memory]
        if config.enable_checkpointing is not False:
            callbacks += run_checkpoints(folder)
            if self.subcommand == "fit":
                callbacks.append(AutoSave(folder, self.config.fit.max_lost, self.signals, self.claim.lock))
        given = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        own = [str(getattr(one, "class_path", "")) for one in given]
        for cls, kind, wanted in (
            (Progress, "ProgressBar", config.enable_progress_bar),
            (Summary, "ModelSummary", config.enable_model_summary),
        ):
            if wanted is not False and not any(name.endswith(kind) for name in own):
                callbacks.append(cls())
        self.trainer_defaults["callbacks"] = callbacks
        plugins = self._get(self.config_init, "trainer").get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        kwargs["strategy"] = chosen(self._get(self.config_init, "trainer").get("strategy"), str(self.subcommand))
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, ImportError) as error:
            raise input_error(error) or trainer_refusal(error, config.accelerator) from error
        spread(trainer.strategy, trainer.world_size)
        order = lambda one: (*(not isinstance(one, kind) for kind in (RunFolder, ProgressBar)), isinstance(one, Trace))  # noqa: E731
        trainer.callbacks.sort(key=order)  # type: ignore[attr-defined]
        return trainer  # the folder is said first; the bar has ended when others print; a trace follows the account

    def _run_subcommand(self, subcommand: str) -> None:
        with stop_launched(self.trainer):
            super()._run_subcommand(subcommand)

    def before_test(self) -> None:
        """A task's own table is the only one."""
        if self.model.OWN_TABLE:
            self.config_init.test.verbose = False

    def before_fit(self) -> None:
        """A resumed run has its own weights and no longer needs its initial checkpoint."""
        if self.config.fit.get("ckpt_path"):
            self.model.on_resume()
