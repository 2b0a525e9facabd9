"""Names the visits of a batch, says which of them look wrong, and saves the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import pandas as pd
import torch
from torch import Tensor

from lssl.data import STEP
from lssl.data.batch import PairBatch
from lssl.data.pairs import count, visit_name
from lssl.utils.torch_file import write_torch

__all__ = ["forget_terms", "images_finite", "named_visits", "odd_visits", "save_batch", "some", "table_of"]

NAMED = 4  # names that a sentence lists
EXTREME = 100.0  # images are scaled so that the brightest tissue is about 1


def named_visits(batch: Any, table: pd.DataFrame | None = None) -> list[str]:
    """Names of the visits of a batch, without repetition.

    Args:
        batch: a PairBatch, or a mapping of several; anything else has no names.
        table: of the visits; without it, they are named by their numbers.
    """
    names = [name for part in _parts(batch) for *_, name in _visits(part, table)]
    return list(dict.fromkeys(names))


def images_finite(batch: Any) -> bool:
    """Whether all voxels of a batch are finite; waits for the device."""
    return all(bool(part.images.isfinite().all()) for part in _parts(batch))


def odd_visits(batch: Any, table: pd.DataFrame | None = None) -> list[str]:
    """A phrase for each visit of a batch whose voxels are not finite, constant, or far from the usual scale.

    Args:
        batch: a PairBatch, or a mapping of several.
        table: of the visits.
    """
    found = [
        f"{name} {what}"
        for part in _parts(batch)
        for pair, visit, name in _visits(part, table)
        if (what := _oddness(_inside(part, pair, visit)))
    ]
    return list(dict.fromkeys(found))


def save_batch(path: Path, batch: Any, **facts: Any) -> None:
    """Writes a batch and facts about it as plain tensors, which ``torch.load(path, weights_only=True)`` reads.

    Args:
        path: the file.
        batch: a PairBatch, a mapping of several, or anything that torch saves.
        **facts: plain values.
    """
    write_torch(path, {"batch": _plain(batch), **facts})


def table_of(trainer: L.Trainer) -> pd.DataFrame | None:
    """The table of visits of a trainer's data; ``None`` if its datamodule has none."""
    table = getattr(trainer.datamodule, "table", None)  # type: ignore[attr-defined]
    return table if isinstance(table, pd.DataFrame) else None


def forget_terms(module: L.LightningModule) -> None:
    """Empties the terms of a task's latest step, so that they are never taken for those of the next one."""
    cast(Any, module).latest_terms = {}


def some(names: Sequence[str]) -> str:
    """The first names, and how many follow."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _plain(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: _plain(part) for name, part in batch.items()}
    if isinstance(batch, PairBatch):
        batch = batch.to("cpu")
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return batch


def _parts(batch: Any) -> Iterator[PairBatch]:
    if isinstance(batch, Mapping):
        for part in batch.values():
            yield from _parts(part)
    elif isinstance(batch, PairBatch):
        yield batch


def _visits(batch: PairBatch, table: pd.DataFrame | None) -> Iterator[tuple[int, int, str]]:
    """Pair, visit of the pair, and name."""
    for pair, rows in enumerate(batch.session.tolist()):
        for visit, row in enumerate(rows):
            known = table is not None and 0 <= row < len(table)
            yield pair, visit, visit_name(table, row) if known and table is not None else f"the visit in row {row}"


def _inside(batch: PairBatch, pair: int, visit: int) -> Tensor:
    """Voxels of a visit without padding."""
    d, h, w = batch.extent[pair, visit].tolist()
    voxels = batch.images[pair, visit, :, :d, :h, :w]
    return voxels.float() * STEP if voxels.dtype == torch.int16 else voxels


def _oddness(voxels: Tensor) -> str:
    finite = voxels.isfinite()
    if not finite.all():
        return f"is NaN or infinite in {count(int((~finite).sum()), 'voxel')}"
    low, high = (float(value) for value in voxels.aminmax())
    if low == high:
        return f"is constant ({low:g}) within its box"
    largest = max(-low, high)
    return f"holds values up to {largest:.3g}, while tissue is about 1" if largest > EXTREME else ""
