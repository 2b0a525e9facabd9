"""The run folder: one per ``lssl fit``, holding the resolved config, metrics, checkpoints and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

import lssl
from lssl.data.description import describe
from lssl.runs.loggers import store_config
from lssl.task import CHECKPOINT_FORMAT
from lssl.utils.errors import InputError
from lssl.utils.files import refuse_damaged, remove_parts

__all__ = ["CONFIG", "RunFolder", "back_up", "checkpoint_path", "new_run_folder", "resolved_text", "run_checkpoints"]

CONFIG = "config.yaml"


def new_run_folder(folder: Path, resuming: bool) -> Path:
    """The folder for a new run: ``folder`` itself, or ``folder-2``, ``-3`` … if it already holds a run.

    A resumed run stays in its folder; the files it would overwrite are kept under a numbered name.
    """
    remove_parts(folder / "checkpoints")
    if resuming or any(folder.glob("hpc_ckpt_*.ckpt")):  # second case: requeued by SLURM, Lightning resumes by itself
        for name in (CONFIG, "metrics.csv"):
            back_up(folder / name)
        return folder
    number, free = 1, folder
    while (free / CONFIG).exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    if number > 1:
        rank_zero_info(f"{folder} holds an earlier run; this one goes to {free}.")
    return free


def back_up(path: Path) -> None:
    """Moves a file that is about to be overwritten to a numbered name."""
    if path.exists():
        number = 1
        while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
            number += 1
        path.rename(kept)


def checkpoint_path(given: str | None, folder: Path) -> str | None:
    """Resolves ``best`` and ``last`` to the run folder's checkpoints; refuses one that is missing or damaged."""
    if given is None:
        return None
    path = folder / "checkpoints" / f"{given}.ckpt" if given in ("best", "last") else Path(given)
    if not path.is_file():
        raise InputError(f"There is no checkpoint {path}.")
    refuse_damaged(path)
    return str(path)


def run_checkpoints(folder: Path) -> list[Callback]:
    """Best (lowest validation loss) and last (end of the latest epoch, from which training continues exactly)."""
    common: dict[str, Any] = {"dirpath": folder / "checkpoints", "enable_version_counter": False}
    best = ModelCheckpoint(filename="best", monitor="val/loss", **common)
    last = ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **common)
    return [best, last]


class RunFolder(SaveConfigCallback):
    """Writes the resolved config into the run folder and into every checkpoint.

    Args:
        references: key path → reference, for values from the environment, which are not saved.
        **options: those of LightningCLI's callback.
    """

    def __init__(
        self, parser: Any, config: Any, references: Mapping[tuple[str, ...], str] | None = None, **options: Any
    ) -> None:
        super().__init__(parser, config, overwrite=True, **options)
        self.references = references or {}
        self.data: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Writes nothing yet, so that a mistake found by the first checks leaves no folder."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the config in training only; testing does not change it."""
        self.data = describe(trainer.datamodule)  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CONFIG).write_text(self._text())
            store_config(trainer, yaml.safe_load(self._text()))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the config, the version of lssl and a description of the data to the checkpoint."""
        about = {"format": CHECKPOINT_FORMAT, "version": lssl.__version__, "data": self.data}
        checkpoint["lssl"] = {**about, "config": self._text()}

    def _text(self) -> str:
        return resolved_text(self.parser, self.config, self.references)


def resolved_text(parser: Any, config: Any, references: Mapping[tuple[str, ...], str]) -> str:
    """A config as YAML; values from the environment stay references.

    Args:
        parser: of the command.
        config: its namespace.
        references: key path → reference.
    """
    text: str = parser.dump(config, skip_none=False)
    if not references:
        return text
    content = yaml.safe_load(text)
    for (*path, last), reference in references.items():
        node = content
        for key in path:
            node = node[int(key) if isinstance(node, list) else key]
        node[int(last) if isinstance(node, list) else last] = reference
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
