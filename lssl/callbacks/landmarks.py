"""Landmarks: matching errors of an anatomical embedding, untrained and trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.table import Table

from lssl.correspondence.landmarks import landmark_errors, one_pair_per_subject
from lssl.correspondence.matchers import AnatomicalMaps, EmbeddingMatcher
from lssl.data.source import DataSource
from lssl.utils.errors import InputError, positive

__all__ = ["Landmarks"]


class Landmarks(L.Callback):
    """Matches points of held-out subjects before and after training and shows both at the end of ``fit``.

    The truth is what the source of data says (:meth:`lssl.data.source.DataSource.correspond`) where it knows, as the
    phantom does; else the frame that a subject's visits share. The table is also written to ``landmarks.json``; see
    :func:`lssl.correspondence.landmarks.landmark_errors` for what is measured.

    Args:
        subjects: most held-out subjects to use.
        points: per pair of visits.
        round_trip: see :class:`lssl.correspondence.matchers.EmbeddingMatcher`.
        rounds: likewise.
    """

    def __init__(self, subjects: int = 8, points: int = 256, round_trip: float = 10.0, rounds: int = 2) -> None:
        positive(subjects=subjects, points=points, round_trip=round_trip)
        self.subjects, self.points, self.round_trip, self.rounds = subjects, points, round_trip, rounds
        self.before: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a strategy that has no embedding to match by."""
        if not isinstance(pl_module, AnatomicalMaps):
            raise InputError(
                f"trainer.callbacks: Landmarks needs anatomical maps, which {type(pl_module).__name__} has not; "
                "take it out, or train AnatomicalEmbedding."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures the network as it starts."""
        if trainer.is_global_zero and trainer.global_step == 0:
            self.before = self._measure(trainer, pl_module)
            if not self.before:
                rank_zero_warn("Landmarks: no held-out subject has two visits, so nothing is measured.")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures again, prints, writes."""
        if not trainer.is_global_zero or not self.before:  # a resumed run has no untrained network to compare with
            return
        after = self._measure(trainer, pl_module)
        Console(width=None if sys.stdout.isatty() else 140).print(_table(self.before, after))
        path = Path(trainer.default_root_dir) / "landmarks.json"
        path.write_text(json.dumps({"untrained": self.before, "trained": after}, indent=1))

    def _measure(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, float]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        pairs = one_pair_per_subject(data.val_dataloader(), self.subjects)
        if not pairs:
            return {}
        matcher = EmbeddingMatcher(module, self.round_trip, rounds=self.rounds)
        truth = data.correspond if isinstance(data, DataSource) and data.knows_correspondence else None
        return landmark_errors(matcher, [pair.to(module.device) for pair in pairs], truth, self.points)


def _table(before: dict[str, float], after: dict[str, float]) -> Table:
    kinds = {kind: title for kind, title in _KINDS.items() if f"{kind}/median" in after}
    title = f"Landmarks found again (voxels of {after['voxel']:.3g} mm)"
    table = Table("Held-out subjects, untrained → trained", title=title, title_justify="left")
    for heading in kinds.values():
        table.add_column(heading, justify="right", no_wrap=True)
    voxel = after["voxel"]
    rows = {
        "↓ median error, mm": ("median", 1.0),
        "↓ median error, voxels": ("median", voxel),
        "↓ mean error, mm": ("mean", 1.0),
        "↑ share that returns on the way back": ("kept", 1.0),
        "↓ median error of these, mm": ("median_kept", 1.0),
    }
    for text, (name, unit) in rows.items():
        table.add_row(
            text, *(" → ".join(f"{run[f'{kind}/{name}'] / unit:.2f}" for run in (before, after)) for kind in kinds)
        )
    table.add_row(
        "  for comparison: the frame's own coordinates, mm", *(f"{after[f'{kind}/frame']:.2f}" for kind in kinds)
    )
    return table


_KINDS = {"visits": "other visit", "subjects": "other subject"}
