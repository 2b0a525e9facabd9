"""A cohort whose visits are numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from lssl.data.batch import Visit
from lssl.data.datamodule import PairDataModule

SHAPE = (20, 24, 22)


def table_of(**times) -> pd.DataFrame:
    """A visit table from subject=[time of each visit]."""
    rows = [
        (subject, f"ses-{number}", np.nan, float(time))
        for subject, visits in times.items()
        for number, time in enumerate(visits, 1)
    ]
    return pd.DataFrame(rows, columns=["subject", "session", "age", "time"])


class Toy(PairDataModule):
    """Visits whose voxels hold the row of the visit plus a ramp that tells where they come from."""

    def __init__(self, table: pd.DataFrame, **options) -> None:
        super().__init__(**options)
        self.rows = table

    def visit_table(self) -> pd.DataFrame:
        return self.rows

    def read(self, row: int) -> Visit:
        ramp = torch.arange(20 * 24 * 22, dtype=torch.float32).reshape(1, *SHAPE)
        foreground = torch.zeros(SHAPE, dtype=torch.bool)
        foreground[12:19, 4:9, 10:20] = True
        affine = torch.diag(torch.tensor([2.0, 1.0, 1.5, 1.0], dtype=torch.float64))
        return Visit(ramp + row / 100, affine, foreground)


COHORT = {f"p{number:02d}": [0, 1, 2] if number < 4 else [0] for number in range(14)}


def toy(**options) -> Toy:
    source = Toy(table_of(**COHORT), **options)
    source.setup()
    return source
