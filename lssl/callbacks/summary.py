"""Summary: the parts of a task and their weights, at the start of a run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import ModelSummary
from rich.console import Console
from rich.table import Table

__all__ = ["Summary"]

LEFT = (" ", "FLOPs", "In sizes", "Out sizes")  # numbers of rows, and what is known with an example input alone


class Summary(ModelSummary):
    """Lightning's summary without operations, which it counts for an example input that tasks do not have.

    ``cost.json`` has the operations of a step, measured.
    """

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **options: Any,
    ) -> None:
        """Prints the table, and a line with its sum; the arguments are Lightning's."""
        columns = [(name, cells) for name, cells in summary_data if name not in LEFT]
        table = Table(header_style="bold")
        for name, _ in columns:
            table.add_column(name, justify="right" if name == "Params" else "left", no_wrap=True)
        for cells in zip(*(cells for _, cells in columns), strict=True):
            table.add_row(*map(str, cells))
        console = Console(highlight=False)
        console.print(table)
        console.print(
            f"{total_parameters:,} weights ({model_size:,.3g} MB), of which {trainable_parameters:,} are trained."
        )
