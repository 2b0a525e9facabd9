"""Weights & Biases for run folders: offline or online, resumed under one id, grouped, with config and checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

__all__ = ["RunWandb", "store_config"]

ID = "wandb_id.txt"


class RunWandb(WandbLogger):
    """Logs a run folder to W&B.

    The folder keeps the run's id, so that ``--ckpt_path last`` continues the same W&B run, even after it was killed.
    The resolved config is stored as the run's config. Offline, everything is written into the run folder; ``wandb
    sync`` sends it later. Pictures and monitors are logged at the step they were made at.

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


def store_config(trainer: L.Trainer, config: dict[str, Any]) -> None:
    """Sends the resolved config to W&B; for other loggers, it is a file in the run folder."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(config)
