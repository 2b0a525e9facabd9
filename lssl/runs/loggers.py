"""Loggers of run folders: metrics.csv, which a resumed run continues; Weights & Biases, resumed under one id."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

__all__ = ["RunCSVLogger", "RunWandb", "store_config"]

ID = "wandb_id.txt"


class RunCSVLogger(CSVLogger):
    """Lightning's CSVLogger, except that an earlier ``metrics.csv`` stays until there is something to write.

    So nothing is lost if a checkpoint cannot be loaded; :class:`lssl.resume.ExactResume` then continues the file.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of ``metrics.csv``; the first access makes the folder."""
        if self._experiment is None:
            self._experiment = _LateWriter(log_dir=self.log_dir)
        return self._experiment


class _LateWriter(ExperimentWriter):
    """Deletes an earlier file when it first writes, unless its columns have been taken over."""

    def _check_log_dir_exists(self) -> None:
        """Keeps what is there."""

    def save(self) -> None:
        """Writes the recorded rows."""
        if self.metrics and not self.metrics_keys:
            Path(self.metrics_file_path).unlink(missing_ok=True)
        super().save()


class RunWandb(WandbLogger):
    """Logs a run folder to W&B.

    The folder keeps the run's id, so that ``--ckpt_path last`` continues the same W&B run, even after it was killed.
    The resolved config is stored as the run's config. Offline, everything is written into the run folder; ``wandb
    sync`` sends it later. Without a network, the run goes on offline and says so. Pictures and monitors are logged at
    the step they were made at.

    Args:
        save_dir: the run folder; ``lssl fit`` fills it in.
        project: of W&B.
        group: seeds, folds and repetitions that belong together; ``None`` takes the run folder's name without the
            number of a repetition (``runs/demo-2`` joins ``demo``).
        name: of the run; ``None`` takes the run folder's.
        offline: write into the run folder instead of sending.
        artifact: store the best and the last checkpoint with the run when it ends.
    """

    def __init__(
        self,
        save_dir: str = "runs",
        project: str = "lssl",
        group: str | None = None,
        name: str | None = None,
        offline: bool = False,
        artifact: bool = False,
    ) -> None:
        if not offline and (lacking := _unreachable()):
            offline = True
            rank_zero_warn(
                f"W&B: {lacking}, so the run is logged offline; `wandb sync` on the run folder sends it later."
            )
        self._folder = Path(save_dir)
        own = self._folder.resolve().name
        known = self._folder / ID
        super().__init__(
            name=name or own,
            save_dir=save_dir,
            project=project,
            id=known.read_text().strip() if known.is_file() else None,
            log_model=artifact,
            group=group or re.sub(r"-\d+$", "", own),
            mode="offline" if offline else None,  # Lightning's own option refuses to store checkpoints for later
        )

    @property
    def experiment(self) -> Any:
        """The W&B run; the first access starts it and stores its id."""
        started = self._experiment is not None
        run = super().experiment
        if not started and getattr(run, "id", None) and int(getattr(rank_zero_only, "rank", 0)) == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / ID).write_text(f"{run.id}\n")
        return run

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Stores checkpoints if configured, then closes the run, so that everything is on disk."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(status != "success"))
            self._experiment = None


def _unreachable(seconds: float = 5.0) -> str:
    """Why W&B's server cannot be reached, empty if it can; wandb itself would try for minutes."""
    if os.environ.get("WANDB_MODE", "online") != "online":
        return ""  # the user decides
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host, port = server.hostname or "api.wandb.ai", server.port or (80 if server.scheme == "http" else 443)
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except OSError as error:
        return f"{host} cannot be reached ({error})"
    return ""


def store_config(trainer: L.Trainer, config: dict[str, Any]) -> None:
    """Sends the resolved config to W&B; for other loggers, it is a file in the run folder."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(config)
