"""Pictures: what the network is shown and what it makes of it, for the run folder and the logger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lssl.callbacks.held_out import held_out_batch
from lssl.data.batch import PairBatch
from lssl.evaluation.representation import trained_taps
from lssl.networks.sharding import whole
from lssl.task import Task
from lssl.utils.distributed import no_sync
from lssl.utils.errors import InputError

__all__ = ["Pictures", "send"]


@runtime_checkable
class _TakesImages(Protocol):
    """A logger such as Weights & Biases'."""

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Shows images under a name."""


class Pictures(L.Callback):
    """Draws one held-out pair into ``pictures/`` of the run folder, every so many steps and at the end.

    ``views.png``: the visits, their views and where these lie; ``features.png``: principal components at each trained
    tap; ``similarity.png``: one marked voxel against the whole other visit, of the untrained network and of the present
    one; ``reconstruction.png``, if the method makes one; ``terms.png`` and ``monitors.png``, at the end, of what
    ``metrics.csv`` holds. The latest stay; a logger that takes images (TensorBoard, W&B) keeps them all.

    Args:
        every: steps from one drawing to the next; 0 draws at the end only.
        pair: number of the validation batch whose first pair is drawn.
        tap: of the similarity; ``None`` takes the last one that is trained.
    """

    def __init__(self, every: int = 1000, pair: int = 0, tap: str | None = None) -> None:
        if every < 0 or pair < 0:
            raise InputError("Pictures: give every and pair 0 or more.")
        self.every, self.pair, self.tap = every, pair, tap
        self._scene: Any = None
        self._untrained: dict[str, Any] = {}
        self._step = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a tap that the backbone lacks, before any step."""
        if self.tap and isinstance(pl_module, Task):
            pl_module.backbone.check_taps([self.tap])

    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps what the untrained network finds; a resumed run has none to compare with."""
        if trainer.global_step or not trainer.is_global_zero or not isinstance(pl_module, Task):
            return
        batch = held_out_batch(trainer, self.pair)
        if batch is not None:
            with no_sync():
                self._untrained = {"untrained": self._similarity(pl_module, batch)}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draws where it is due."""
        step = trainer.global_step
        if self.every and step and step % self.every == 0 and step != self._step:
            self._step = step
            whole(pl_module)
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws the result, and the curves."""
        self._draw(trainer, pl_module)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()
            self._draw_curves(trainer)

    @torch.no_grad()
    def _draw(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero or not isinstance(module, Task):
            return
        from lssl.pictures.features import draw_features
        from lssl.pictures.reconstruction import draw_reconstruction
        from lssl.pictures.similarity import draw_similarity
        from lssl.pictures.views import draw_views

        batch = held_out_batch(trainer, self.pair)
        if batch is None:
            if self._step < 0:
                rank_zero_warn("Pictures: there is no held-out pair, so nothing is drawn; see data.init_args.split.")
            return
        folder, taps = Path(trainer.default_root_dir) / "pictures", trained_taps(module)
        with no_sync():
            maps = {**self._untrained, f"step {trainer.global_step}": self._similarity(module, batch)}
            kinds: dict[str, Callable[[Path], Any]] = {
                "views": lambda path: draw_views(self._scene, path),
                "features": lambda path: draw_features(module, self._scene, path, taps),
                "similarity": lambda path: draw_similarity(maps, path, self.tap or taps[-1]),
                "reconstruction": lambda path: draw_reconstruction(module, self._scene, path),
            }
            for name, draw in kinds.items():
                if draw(folder / f"{name}.png") is not False:
                    send(trainer, name, folder / f"{name}.png")

    def _similarity(self, module: Task, batch: PairBatch) -> Any:
        from lssl.pictures.scene import scene
        from lssl.pictures.similarity import similarity_map

        self._scene = self._scene or scene(module, batch)
        return similarity_map(module, self._scene, self.tap or trained_taps(module)[-1])

    @staticmethod
    def _draw_curves(trainer: L.Trainer) -> None:
        from lssl.runs.curves import draw_monitors, draw_terms
        from lssl.runs.log import read_run

        folder = Path(trainer.default_root_dir)
        if (folder / "metrics.csv").is_file():
            run = read_run(folder)
            for name, draw in (("terms", draw_terms), ("monitors", draw_monitors)):
                if draw([run], folder / "pictures" / f"{name}.png"):
                    send(trainer, name, folder / "pictures" / f"{name}.png")


def send(trainer: L.Trainer, name: str, path: Path) -> None:
    """Hands a PNG to every logger that takes images."""
    from lightning.pytorch.loggers import TensorBoardLogger

    for logger in trainer.loggers:
        if isinstance(logger, _TakesImages):
            logger.log_image(f"pictures/{name}", [str(path)], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            from matplotlib.image import imread

            pixels = np.asarray(imread(path))[..., :3]
            logger.experiment.add_image(f"pictures/{name}", pixels, trainer.global_step, dataformats="HWC")
