"""``visits.tsv`` of a folder of predictions: which visits were seen, when, where, and how they look."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lssl.data.batch import PairBatch
from lssl.metrics.entropy_focus import entropy_focus
from lssl.utils.distributed import every_rank, rank
from lssl.utils.files import atomic_write

__all__ = ["VISITS", "VisitLog"]

VISITS = "visits.tsv"


class VisitLog:
    """Collects the visits that ``lssl predict`` has seen.

    ``visits.tsv`` holds subject, session, age, years since the first visit, site if the data know it, and ``motion``:
    the entropy focus criterion of the first channel (:func:`lssl.metrics.entropy_focus.entropy_focus`), if it is there.
    """

    def __init__(self) -> None:
        self.motion: dict[int, float] = {}

    def add(self, batch: PairBatch) -> None:
        """Adds the first visits of a batch."""
        for number, (row, image) in enumerate(zip(batch.session[:, 0].tolist(), batch.images[:, 0, 0], strict=True)):
            has = batch.present is None or bool(batch.present[number, 0, 0])
            self.motion[row] = float(entropy_focus(image)) if has else float("nan")

    def write(self, folder: Path, table: pd.DataFrame) -> None:
        """Writes the visits of all processes, in the table's order; every process calls it, the first one writes.

        Args:
            folder: of the predictions.
            table: of the data.
        """
        motion = {row: value for of_rank in every_rank(self.motion) for row, value in of_rank.items()}
        if rank() > 0:
            return
        rows = sorted(motion)
        columns = [name for name in ("subject", "session", "age", "time", "site") if name in table]
        visits = table.iloc[rows][columns].rename(columns={"time": "years"})
        visits["motion"] = [motion[row] for row in rows]
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / VISITS) as part:
            visits.to_csv(part, sep="\t", index=False, float_format="%.8g", na_rep="n/a")
