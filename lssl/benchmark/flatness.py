"""Whether a row was trained until it was flat; without torch.

A difference between rows that still improve shows which of them is faster, not which is better. There are two signs:

- The training loss still falls at the end: a line is fitted to the last third of its logged values, and it falls by
  more than :data:`FALL` of its mean and by more than two standard errors.
- A longer budget of the same strategy and labels is better, and the interval of the paired difference lies above 0.

A schedule that ends at 0 flattens every loss, so a row without a sign may still not be flat: the second sign, which
needs two budgets, is the stronger one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

__all__ = ["loss_fall"]

FALL = 0.05
LEAST = 6  # values in the last third, fewer say nothing


def loss_fall(log: Path) -> float | None:
    """Fall of the training loss over the last third, as a share of its mean; 0 within two standard errors.

    Args:
        log: ``metrics.csv`` of a run.

    Returns:
        The share; ``None`` if fewer than :data:`LEAST` values were logged in the last third.
    """
    table = pd.read_csv(log) if log.is_file() else pd.DataFrame()
    if "train/loss" not in table:
        return None
    known = table[["step", "train/loss"]].dropna()
    return fall(known["step"].tolist(), known["train/loss"].tolist())


def fall(steps: Sequence[float], losses: Sequence[float]) -> float | None:
    """Like :func:`loss_fall`, from values."""
    step, loss = np.asarray(steps, float), np.asarray(losses, float)
    last = step >= step.max() * 2 / 3 if len(step) else np.zeros(0, bool)
    step, loss = step[last], loss[last]
    if len(step) < LEAST or np.ptp(step) == 0:
        return None
    centred = step - step.mean()
    slope = float(centred @ loss / (centred @ centred))
    rest = loss - loss.mean() - slope * centred
    error = float(np.sqrt(rest @ rest / (len(step) - 2) / (centred @ centred)))
    if -slope <= 2 * error:
        return 0.0
    return float(-slope * np.ptp(step) / max(abs(loss.mean()), 1e-12))
