"""Checks of all cells before any of them runs: configs must resolve, and no test subject may be trained on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lssl.benchmark.plan import Cell, Plan
from lssl.cli.compose import Config
from lssl.cli.references import resolved
from lssl.data.duplicates import check_duplicates
from lssl.utils.errors import InputError
from lssl.utils.files import digest

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["check_cells", "check_leakage", "resolve"]


def check_cells(plan: Plan, cells: Sequence[Cell]) -> None:
    """Runs both checks; ``cells`` are those that would run."""
    with on_sys_path(plan.path.parent):
        resolve(cells)
        check_leakage(plan.cells, rotate=bool(plan.rotate))


@contextlib.contextmanager
def on_sys_path(folder: Path) -> Iterator[None]:
    """Makes a user's own files beside the plan importable, as in the cells' processes."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))


def resolve(cells: Sequence[Cell]) -> None:
    """Refuses a config that ``lssl fit`` cannot read; cells that differ only in numbers are checked once."""
    from lssl.cli.training import TrainingCLI

    alike = {(cell.stage, cell.task, cell.strategy, cell.budget): cell for cell in reversed(cells)}
    for cell in reversed(alike.values()):
        try:
            TrainingCLI.check(Config().add(cell.config))
        except InputError as error:
            raise InputError(f"The config of {cell.name} does not resolve: {error}") from None


def check_leakage(cells: Sequence[Cell], rotate: bool = False) -> None:
    """Refuses a subject or scan that one cell trains or validates on and another tests on.

    Subjects are compared by name, scans by their voxels (:mod:`lssl.data.duplicates`).

    Args:
        cells: of the plan.
        rotate: seeds test on each other's subjects by intention, so each fine-tuning is compared with itself and the
            pretraining it starts from.
    """
    tables: dict[str, pd.DataFrame] = {}
    named = {cell.name: cell for cell in cells}
    tuned = [cell for cell in cells if cell.stage == "finetune"]
    groups = [[cell, *([named[cell.needs]] if cell.needs else [])] for cell in tuned] if rotate else [cells]
    seen = set()
    for group in groups:
        alike = {digest([cell.stage, _data(cell)]): cell for cell in reversed(group)}
        if (key := frozenset(alike)) not in seen:
            seen.add(key)
            for name, cell in alike.items():
                if name not in tables:
                    tables[name] = _instantiate(_data(cell)).table
            _compare([(cell, tables[name]) for name, cell in reversed(alike.items())])


def _compare(found: Sequence[tuple[Cell, pd.DataFrame]]) -> None:
    """The check of cells and their visits."""
    import pandas as pd

    trained: dict[str, str] = {}
    tested: dict[str, str] = {}
    for cell, table in found:
        parts = {part: set(table["subject"][table["split"] == part]) for part in ("train", "val", "test")}
        if cell.stage == "finetune":
            for part, why in (("val", "to choose the learning rate on"), ("test", "to compare the rows on")):
                if not parts[part]:
                    raise InputError(f"The data of {cell.name} have no {part} subjects {why}; change data's split.")
            tested |= dict.fromkeys(parts["test"], cell.name)
        trained |= dict.fromkeys(parts["train"] | parts["val"], cell.name)
    for name in sorted(trained.keys() & tested.keys()):
        raise InputError(
            f"Subject {name} is tested on in {tested[name]} and trained or validated on in {trained[name]}; give all "
            f"cells one split (data.init_args.seed and split, or a column split), or the subjects of two cohorts other "
            f"names."
        )
    tables = [
        table.assign(split=["test" if part == "test" else "train" for part in table["split"]]) for _, table in found
    ]
    check_duplicates(pd.concat(tables, ignore_index=True).drop_duplicates(["subject", "session", "split"]))


def _data(cell: Cell) -> dict[str, Any]:
    """The data group without the choice of labels, which does not affect the splits."""
    data: dict[str, Any] = resolved(cell.config)["data"]
    options = {key: value for key, value in (data.get("init_args") or {}).items() if key != "few_shot"}
    return {**data, "init_args": options}


def _instantiate(data: dict[str, Any]) -> Any:
    import lightning as L
    from jsonargparse import ArgumentParser

    from lssl.cli.registered import registered
    from lssl.data.source import DataSource

    registered()  # so that short names are known
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    module = parser.instantiate(parser.parse_object({"data": data})).data
    module.setup("fit")
    if not isinstance(module, DataSource):
        raise InputError(f"data: {type(module).__name__} has no table of visits, so that subjects cannot be compared.")
    return module
