"""Few-shot labels: which labels training may see, and how labelled visits are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import distributed

from lssl.utils.errors import InputError, positive

__all__ = ["FewShot", "choose_labelled", "repeated", "require_labels"]


@dataclass
class FewShot:
    """Which labels of the training subjects may be seen, and how labelled visits are drawn.

    The seed chooses the labelled subjects. All subjects stand in one fixed random order, and seed s takes the s-th
    group of ``subjects`` of it. So seeds 0, 1, 2 … label other subjects, and a subject repeats only after all were
    used. For one-shot: ``subjects: 1, visits: 1``.

    Attributes:
        subjects: number of labelled training subjects; ``None`` takes all subjects with labels.
        visits: labelled visits per subject, drawn by the seed; ``None`` takes all visits with labels.
        seed: of the choice.
        batch_size: labelled visits per step; each gives two views.
        steps: training steps of an epoch, at most those of the run; more if there are more unlabelled pairs.
    """

    subjects: int | None = None
    visits: int | None = None
    seed: int = 0
    batch_size: int = 2
    steps: int = 50

    def __post_init__(self) -> None:
        positive(batch_size=self.batch_size, steps=self.steps)
        for name, value in (("subjects", self.subjects), ("visits", self.visits)):
            if value is not None and value < 1:
                raise InputError(f"few_shot: {name} is {value}; give at least 1, or null for all.")


def choose_labelled(rows: np.ndarray, subject: np.ndarray, few_shot: FewShot) -> np.ndarray:
    """The rows whose labels may be seen, sorted.

    Args:
        rows: labelled visits of the training subjects.
        subject: ``(visits,)`` number of each row's subject.
        few_shot: what to choose.
    """
    names = np.unique(subject[rows])
    if few_shot.subjects is not None and len(names):
        if few_shot.subjects > len(names):
            raise InputError(
                f"few_shot: {few_shot.subjects} subjects are asked for, but {len(names)} training subjects have a "
                f"label; ask for fewer, or give more labels."
            )
        order = np.random.default_rng(0).permutation(names)
        names = np.roll(order, -few_shot.seed * few_shot.subjects)[: few_shot.subjects]
    draw = np.random.default_rng([few_shot.seed, 1])
    chosen = []
    for name in names:
        visits = rows[subject[rows] == name]
        most = len(visits) if few_shot.visits is None else min(few_shot.visits, len(visits))
        chosen.append(draw.permutation(visits)[:most])
    return np.sort(np.concatenate(chosen)) if chosen else rows


def require_labels(rows: np.ndarray) -> None:
    """Refuses to train without a labelled visit."""
    if not len(rows):
        raise InputError(
            "There is no labelled visit to train on: give labels (data.init_args.labels, or a column label of the "
            "table) to subjects of the training split."
        )


def repeated(rows: np.ndarray, few_shot: FewShot, trainer: Any = None) -> np.ndarray:
    """The rows repeated until they fill an epoch on all devices.

    Args:
        rows: labelled visits.
        few_shot: batch size, and steps of an epoch.
        trainer: if its whole run has fewer steps than an epoch, it is one epoch, and so is validated at its end.
    """
    require_labels(rows)
    steps = few_shot.steps
    if trainer is not None and trainer.max_steps > 0:
        steps = min(steps, trainer.max_steps * trainer.accumulate_grad_batches)
    world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    return rows[np.arange(steps * few_shot.batch_size * world) % len(rows)]
