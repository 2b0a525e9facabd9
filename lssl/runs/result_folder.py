"""ResultFolder: the base of callbacks that write what a command found into a folder of the cohort."""

from __future__ import annotations

from pathlib import Path

import lightning as L

__all__ = ["ResultFolder"]


class ResultFolder(L.Callback):
    """A callback that writes results.

    Attributes:
        folder: of the cohort (:func:`lssl.runs.predictions.prediction_folder`); ``Path()`` before it is known.
    """

    folder: Path = Path()
