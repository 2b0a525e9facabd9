"""Checked of all cells before any of them runs: that configs resolve, and that no test subject is trained on."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lssl.benchmark.plan import Cell, Plan
from lssl.utils.errors import InputError
from lssl.utils.files import digest

__all__ = ["check_cells", "check_leakage", "resolve"]


def check_cells(plan: Plan, cells: Sequence[Cell]) -> None:
    """Both checks; ``cells`` are those that would run."""
    with on_sys_path(plan.path.parent):
        resolve(cells)
        check_leakage(plan.cells)


@contextlib.contextmanager
def on_sys_path(folder: Path) -> Iterator[None]:
    """A user's own file beside the plan can be imported, as in the cells' processes."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))


def resolve(cells: Sequence[Cell]) -> None:
    """Refuses a config that ``lssl fit`` cannot read; one cell stands for all that differ in numbers alone."""
    import yaml

    from lssl.cli.main import main

    alike = {(cell.stage, cell.strategy, cell.budget): cell for cell in reversed(cells)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        for cell in reversed(alike.values()):
            path.write_text(yaml.safe_dump(cell.config, sort_keys=False))
            said = io.StringIO()
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                    main(["fit", "--config", str(path), "--print_config"])
            except SystemExit as end:
                if end.code:
                    lines = said.getvalue().strip().splitlines() or ["no reason was given"]
                    reason = lines[-1].removeprefix("lssl: error: ")
                    raise InputError(f"The config of {cell.name} does not resolve: {reason}") from None


def check_leakage(cells: Sequence[Cell]) -> None:
    """Refuses a subject that any cell trains or validates on and any cell tests on; subjects go by their names."""
    trained: dict[str, str] = {}
    tested: dict[str, str] = {}
    alike = {digest([cell.stage, _data(cell)]): cell for cell in reversed(cells)}
    for cell in reversed(alike.values()):
        table = _instantiate(_data(cell)).table
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


def _data(cell: Cell) -> dict[str, Any]:
    """The data group without the choice of labels, which moves no subject between splits."""
    data = dict(cell.config.get("data") or {"class_path": "PhantomDataModule"})
    options = {key: value for key, value in (data.get("init_args") or {}).items() if key != "few_shot"}
    return {**data, "init_args": options}


def _instantiate(data: dict[str, Any]) -> Any:
    import lightning as L
    from jsonargparse import ArgumentParser

    from lssl.data.source import DataSource

    for point in entry_points(group="lssl.datamodules"):
        point.load()  # so that short names are known
    parser = ArgumentParser(exit_on_error=False, parser_mode="omegaconf")
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    module = parser.instantiate(parser.parse_object({"data": data})).data
    module.setup("fit")
    if not isinstance(module, DataSource):
        raise InputError(f"data: {type(module).__name__} has no table of visits, so that subjects cannot be compared.")
    return module
