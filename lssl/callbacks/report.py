"""Report: compares the untrained and the trained network on held-out subjects, in a table and a picture."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from lssl.callbacks.held_out import held_out_batch, held_out_batches
from lssl.callbacks.pictures import send
from lssl.evaluation.evaluate import evaluate
from lssl.runs.outputs import RunReport, write_report
from lssl.task import Task

__all__ = ["Report"]


class Report(L.Callback):
    """Evaluates the untrained and the trained network on the validation pairs and shows both at the end of ``fit``.

    The table is printed and written to ``report.json``; ``report.png`` shows two visits, two views, and the similarity
    of one marked voxel to the other visit, before and after.

    Args:
        batches: most validation batches to use; ``None`` takes all.
        tap: tap of the picture; ``None`` takes the last one of the backbone.
        pair: number of the validation batch that is drawn.
    """

    def __init__(self, batches: int | None = None, tap: str | None = None, pair: int = 0) -> None:
        self.batches, self.tap, self.pair = batches, tap, pair
        self.before: dict[str, float] = {}
        self.maps: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures the network as it starts."""
        if trainer.is_global_zero and trainer.global_step == 0:
            self.before = self._measure(trainer, pl_module, "untrained")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures again, prints, writes."""
        if not trainer.is_global_zero or not self.before:  # a resumed run has no untrained network to compare with
            return
        after = self._measure(trainer, pl_module, "trained")
        folder = Path(trainer.default_root_dir)
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(_table(self.before, after))
        write_report(folder, RunReport(untrained=self.before, trained=after))
        self._draw(trainer, pl_module, folder / "report.png")
        send(trainer, "report", folder / "report.png")
        for text, name in (
            ("config", "config.yaml"),
            ("metrics", "metrics.csv"),
            ("last checkpoint", "checkpoints/last.ckpt"),
            ("best checkpoint", "checkpoints/best.ckpt"),
            ("picture", "report.png"),
        ):
            if (folder / name).exists():
                console.print(f"{text:>16}  {folder / name}", highlight=False, soft_wrap=True)

    def _draw(self, trainer: L.Trainer, module: L.LightningModule, path: Path) -> None:
        from lssl.pictures.similarity import draw_similarity

        if isinstance(module, Task):
            draw_similarity(self.maps, path, self._tap(module))

    def _measure(self, trainer: L.Trainer, module: L.LightningModule, title: str) -> dict[str, float]:
        from lssl.pictures.scene import scene
        from lssl.pictures.similarity import similarity_map

        batch = held_out_batch(trainer, self.pair)
        if not isinstance(module, Task) or batch is None:
            return {}
        self.maps[title] = similarity_map(module, scene(module, batch), self._tap(module))
        return evaluate(module, held_out_batches(trainer), self.batches)

    def _tap(self, module: Task) -> str:
        return self.tap or list(module.backbone.taps)[-1]


def _table(before: dict[str, float], after: dict[str, float]) -> Table:
    taps = [name.removeprefix("rank/") for name in after if name.startswith("rank/")]
    table = Table("Held-out subjects, untrained → trained", title="What training changed", title_justify="left")
    for tap in taps:
        table.add_column(tap, justify="right", no_wrap=True)
    terms = [name for name in after if name.startswith("term/")]
    rows = [
        ("↑ subject found again at another visit (retrieval@1)", "retrieval"),
        ("↑ effective rank of voxel features", "rank"),
        ("↑ corresponding voxels that find each other", "matching"),
        ("↑ consistency of corresponding voxels across visits", "consistency"),
        ("↓ shortcut: coordinate R² on noise", "shortcut"),
        ("  coordinate R² on images", "position"),
    ]
    for title, kind in rows:
        cells = [" → ".join(_figure(run[f"{kind}/{tap}"]) for run in (before, after)) for tap in taps]
        table.add_row(title, *cells)
    for name in terms:
        table.add_row(f"↓ term {name.removeprefix('term/')}", f"{before[name]:.3g} → {after[name]:.3g}")
    return table


def _figure(value: float) -> str:
    """Shows an R² below 0 as 0: both mean that the fit does not generalise."""
    return "–" if math.isnan(value) else f"{max(0.0, value):.2f}"
