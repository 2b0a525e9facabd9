"""Folders of predictions: one per cohort and checkpoint, so that equal names of subjects never meet; without torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

import lssl
from lssl.utils.errors import InputError
from lssl.utils.files import digest, fingerprint, read_json, write_json

__all__ = ["prediction_folder"]

ABOUT = "dataset_description.json"
WITHIN = "predict"


def prediction_folder(
    run: Path, cohort: str, table: pd.DataFrame, checkpoint: str | Path | None, within: str = WITHIN
) -> Path:
    """The folder ``RUN/predict/COHORT`` or ``RUN/test/COHORT`` of a cohort, described as a BIDS derivative.

    A cohort is known by its path; data without a path by their visits. The same cohort predicted from the same
    weights takes the same folder again. Another cohort of that name, or other weights, takes ``COHORT-2`` and so on.

    Args:
        run: the run folder.
        cohort: path of the data, or a name if they have none.
        table: their visits.
        checkpoint: the weights; ``None`` if they come from no file.
        within: ``predict`` or ``test``.
    """
    path = Path(cohort)
    about = _about(cohort, path, table, checkpoint)
    name = re.sub(r"(\.nii|\.csv|\.tsv|\.mgz?)?(\.gz)?$", "", (path.resolve() if path.exists() else path).name)
    number, folder = 1, run / within / (name or "data")
    while (earlier := read_json(folder / ABOUT)) is not None or _holds_files(folder):
        if isinstance(earlier, dict) and earlier.get("lssl") == about["lssl"]:
            break
        number += 1
        folder = run / within / f"{name or 'data'}-{number}"
    try:
        write_json(folder / ABOUT, about)
    except OSError as error:
        raise InputError(f"Nothing can be written to {folder} ({error.strerror}).") from error
    return folder


def _about(cohort: str, path: Path, table: pd.DataFrame, checkpoint: str | Path | None) -> dict[str, Any]:
    """What a BIDS derivative says of itself, and what tells its cohort and weights from others."""
    known: dict[str, str] = {"weights": fingerprint(str(checkpoint))["hash"] if checkpoint else ""}
    if path.exists():
        known["cohort"] = os.path.realpath(path)
    else:
        columns = [name for name in ("subject", "session", "age", "time") if name in table]
        known["cohort"] = f"{cohort} {digest(json.loads(table[columns].to_json()))}"
    return {
        "Name": f"lssl predictions of {cohort}",
        "BIDSVersion": "1.9.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "lssl", "Version": lssl.__version__}],
        **({"SourceDatasets": [{"URL": Path(known["cohort"]).as_uri()}]} if path.exists() else {}),
        "lssl": known,
    }


def _holds_files(folder: Path) -> bool:
    entries: Iterable[Path] = folder.iterdir() if folder.is_dir() else ()
    return any(not entry.name.startswith(".") for entry in entries)
