"""The run folder: one per ``lssl fit``, holding the resolved config, metrics, checkpoints and pictures."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

import lssl
from lssl.data.description import describe
from lssl.runs.lock import FolderInUse, RunLock, slurm_job
from lssl.runs.loggers import store_config
from lssl.task import CHECKPOINT_FORMAT
from lssl.utils.errors import InputError
from lssl.utils.files import atomic_write, damage, refuse_damaged, remove_parts, writing_failed

__all__ = [
    "CONFIG",
    "Claim",
    "RunFolder",
    "back_up",
    "checkpoint_path",
    "leave",
    "new_run_folder",
    "release",
    "requeued_checkpoint",
    "resolved_text",
    "run_checkpoints",
    "written_into",
]

CONFIG = "config.yaml"


@dataclass
class Claim:
    """A folder for one run.

    Attributes:
        folder: to write into.
        checkpoint: to resume from, or ``None``.
        lock: the sole right to the folder; ``None`` on all processes but the first, which have no folder of their own.
        note: why it is not the configured folder.
        untrained: the run has begun in this process, and no step of it is done.
    """

    folder: Path
    checkpoint: str | None = None
    lock: RunLock | None = None
    note: str = ""
    untrained: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """The lock stays in the process that took it."""
        return {**self.__dict__, "lock": None}


def new_run_folder(folder: Path, checkpoint: str | None = None) -> Claim:
    """Claims ``folder`` for a new run; if it holds a run or another run has claimed it, ``folder-2``, ``-3`` and so on.

    A run that resumes from a checkpoint of ``folder`` stays there, and so does one that SLURM has requeued. Nothing in
    the folder changes yet, temporary files of killed runs aside.

    Args:
        folder: as configured.
        checkpoint: to resume from.
    """
    if checkpoint is not None and folder.resolve() in Path(checkpoint).resolve().parents:
        return _claim(folder, checkpoint)
    number, free = 1, folder
    while True:
        if checkpoint is None and (requeued := requeued_checkpoint(free)):
            return _claim(free, str(requeued))
        if not _holds_run(free):
            with suppress(FolderInUse):
                claim = _claim(free, checkpoint)
                if not _holds_run(free):
                    break
                release(claim)  # a short run has ended since we looked
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    if number > 1:
        claim.note = (
            f"{folder} holds an earlier run, or another one writes there; --ckpt_path last continues the newest"
        )
    return claim


def _claim(folder: Path, checkpoint: str | None) -> Claim:
    """Takes the lock and removes what killed runs left; only the first process does."""
    if int(getattr(rank_zero_only, "rank", 0)):
        return Claim(folder, checkpoint)
    try:
        lock = RunLock(folder)
    except OSError as error:
        raise writing_failed(folder, error) or error from None
    remove_parts(folder)
    remove_parts(folder / "checkpoints")
    return Claim(folder, checkpoint, lock)


def release(claim: Claim) -> None:
    """Gives a folder back."""
    if claim.lock is not None:
        claim.lock.release()


def leave(claim: Claim) -> Callable[..., None]:
    """For an exit stack: gives the folder back; a run that failed before its first step was done leaves none.

    Args:
        claim: its folder stays if it was there before, or holds weights or the batch of the failure.
    """

    def end(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        made = claim.lock is not None and claim.lock.made_folder
        if made and claim.untrained and isinstance(error, Exception) and not _worth_keeping(claim.folder):
            for path in claim.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif claim.lock and path != claim.lock.path:
                    path.unlink(missing_ok=True)
        release(claim)

    return end


def _worth_keeping(folder: Path) -> bool:
    """Whether there are weights, a saved batch, or what another program is still writing."""
    return any(next(folder.glob(pattern), None) is not None for pattern in ("**/*.ckpt", "**/*.pt", "wandb"))


def _holds_run(folder: Path) -> bool:
    patterns = (CONFIG, "config.*.yaml", "metrics*.csv", "hpc_ckpt_*.ckpt", "checkpoints/*.ckpt")
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def requeued_checkpoint(folder: Path) -> Path | None:
    """What Lightning saved when SLURM requeued this very job; a checkpoint of another job is none of ours."""
    job = slurm_job()
    for path in sorted(folder.glob("hpc_ckpt_*.ckpt"), key=_number, reverse=True) if job else ():
        if damage(path) is None:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if content.get("lssl", {}).get("job") == job:
                return path
    return None


def _number(path: Path) -> int:
    return int(re.sub(r"\D", "", path.stem) or 0)


def back_up(path: Path) -> None:
    """Moves a file that is about to be overwritten to a numbered name."""
    if path.exists():
        number = 1
        while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
            number += 1
        path.rename(kept)


def checkpoint_path(given: str | None, folder: Path) -> str | None:
    """Resolves ``best`` and ``last`` to the run folder's checkpoints; refuses one that is missing or damaged.

    A requeue by SLURM may have saved later than ``last``.
    """
    if given is None:
        return None
    path = folder / "checkpoints" / f"{given}.ckpt" if given in ("best", "last") else Path(given)
    if given == "last":
        saved = [file for file in (path, *folder.glob("hpc_ckpt_*.ckpt")) if file.is_file()]
        path = max(saved, key=lambda file: file.stat().st_mtime, default=path)
    if not path.is_file():
        raise InputError(_no_checkpoint(path, given))
    refuse_damaged(path)
    return str(path)


def _no_checkpoint(path: Path, given: str) -> str:
    if given == "best" and path.with_name("last.ckpt").is_file():
        return f"There is no {path}, as the run has not been validated yet; --ckpt_path last takes its latest weights."
    if given in ("best", "last"):
        return f"There is no checkpoint {path}; without --ckpt_path, lssl fit starts a new run."
    return f"There is no checkpoint {path}."


def written_into(folder: Path) -> Callable[..., None]:
    """For an exit stack: turns a failed write into the run folder into one sentence.

    Args:
        folder: it may have become read-only, or be gone.
    """

    def explain(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, OSError) and error.filename is not None:
            path = Path(os.fsdecode(error.filename)).absolute()
            if folder.absolute() in path.parents and (mistake := writing_failed(path, error)):
                raise mistake from error

    return explain


class RunCheckpoint(ModelCheckpoint):
    """Lightning's, except that a run whose folder was moved goes on with its best score and its best checkpoint."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Looks for the files in the present folder; if the best one is not there, the search for it begins anew."""
        here = {
            path: str(Path(str(self.dirpath)) / Path(path).name)
            for path in (*state_dict["best_k_models"], state_dict["best_model_path"], state_dict["kth_best_model_path"])
            if path
        }
        if not all(Path(path).is_file() for path in here.values()):
            return
        paths = {name: here.get(state_dict[name], "") for name in ("best_model_path", "kth_best_model_path")}
        scores = {here[path]: score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": scores, "dirpath": self.dirpath})


def run_checkpoints(folder: Path) -> list[Callback]:
    """Best (lowest validation loss) and last (end of the latest epoch, from which training continues exactly)."""
    common: dict[str, Any] = {"dirpath": folder / "checkpoints", "enable_version_counter": False}
    best = RunCheckpoint(filename="best", monitor="val/loss", **common)
    last = RunCheckpoint(filename="last", save_on_train_epoch_end=True, **common)
    return [best, last]


class RunFolder(SaveConfigCallback):
    """Writes the resolved config into the run folder and into every checkpoint.

    Args:
        references: key path → reference, for values from the environment, which are not saved.
        claim: the folder; ``None`` for commands that do not train.
        **options: those of LightningCLI's callback.
    """

    def __init__(
        self,
        parser: Any,
        config: Any,
        references: Mapping[tuple[str, ...], str] | None = None,
        claim: Claim | None = None,
        **options: Any,
    ) -> None:
        super().__init__(parser, config, overwrite=True, **options)
        self.references = references or {}
        self.data: dict[str, Any] = {}
        self.claim, self.said = claim, False

    def __getstate__(self) -> dict[str, Any]:
        """The claim stays in the process that made it."""
        return {**self.__dict__, "claim": None}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes over the folder that the first process claimed; writes nothing yet."""
        own: Any = trainer
        own._default_root_dir = trainer.strategy.broadcast(trainer.default_root_dir)
        if self.claim:
            self.claim.untrained = True

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Describes the data, for the checkpoints."""
        self.data = describe(trainer.datamodule)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the config in training only, and after the checkpoint of a resumed run has been loaded."""
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / CONFIG
            back_up(path)
            with atomic_write(path) as part:
                part.write_text(self.text)
            store_config(trainer, yaml.safe_load(self.text))

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """From the first step on, the folder stays."""
        if self.claim:
            self.claim.untrained = False
        self._say_folder(trainer)

    def _say_folder(self, trainer: L.Trainer) -> None:
        """Says where the run goes, once: not before a step is done, as a refusal leaves no folder."""
        if trainer.is_global_zero and not self.said:
            note = f" ({self.claim.note})" if self.claim and self.claim.note else ""
            print(f"Run folder: {trainer.default_root_dir}{note}", flush=True)
        self.said = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Removes what SLURM's requeues saved: the run is complete, and its last checkpoint is later."""
        self._say_folder(trainer)
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero and (folder / "checkpoints" / "last.ckpt").is_file():
            for path in folder.glob("hpc_ckpt_*.ckpt"):
                path.unlink(missing_ok=True)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds config, version and a description of the data; refuses if another run has taken the folder."""
        if self.claim is not None and self.claim.lock is not None:
            self.claim.lock.check()
        about = {"format": CHECKPOINT_FORMAT, "version": lssl.__version__, "data": self.data, "job": slurm_job()}
        checkpoint["lssl"] = {**about, "config": self.text}

    @cached_property
    def text(self) -> str:
        """The config as YAML, without what the run was started from: a new run with this config starts anew."""
        config = self.config.clone()
        if config.get("ckpt_path"):
            config.ckpt_path = None
        return resolved_text(self.parser, config, self.references)


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
