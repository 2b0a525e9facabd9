"""Evaluates a task on held-out pairs without training: its loss terms and the metrics of its taps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from lssl.data.batch import PairBatch
from lssl.evaluation.representation import held_out_pairs, measure
from lssl.task import Task
from lssl.utils.distributed import no_sync

__all__ = ["evaluate"]


@torch.no_grad()
@no_sync()
def evaluate(task: Task, batches: Iterable[PairBatch], most: int | None = None) -> dict[str, float]:
    """Terms, and the figures of :mod:`lssl.evaluation.representation` for every tap.

    Args:
        task: evaluated in eval mode, its mode restored.
        batches: held-out pairs; their views and noise are drawn as in validation, the same every time.
        most: number of batches to use.

    Returns:
        ``term/<name>`` and ``<kind>/<tap>``.
    """
    terms: dict[str, list[Tensor]] = {}

    def watched() -> Iterator[PairBatch]:
        """The batches, once: their terms are taken as they pass by."""
        for number, batch in enumerate(islice(batches, most)):
            moved = batch.to(task.device)
            task.seed("val", number)
            for name, value in task.losses(moved).items():
                terms.setdefault(name, []).append(value)
            yield batch

    figures = measure(task, held_out_pairs(task, watched()))
    return {f"term/{name}": torch.stack(values).mean().item() for name, values in terms.items()} | figures
