"""Recognises what a path holds and which datamodule reads it, from names and tables alone; without torch."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lssl.data.sidecars import read_text
from lssl.utils.errors import InputError
from lssl.utils.files import read_json

__all__ = ["Found", "is_prepared", "prepared_options", "recognise"]

NIFTI = (".nii", ".nii.gz")


@dataclass(frozen=True)
class Found:
    """What a path holds.

    Attributes:
        path: as given.
        kind: in words.
        class_path: name of the datamodule that reads it.
        init_args: the arguments that give its location.
    """

    path: str
    kind: str
    class_path: str
    init_args: dict[str, Any]

    def sentence(self, suffix: str | Sequence[str] = "T1w") -> str:
        """One line: kind, visits, subjects, and how many visits are left out.

        Args:
            suffix: of the images that are read, in a BIDS folder; of several, the first is counted.
        """
        suffix = suffix if isinstance(suffix, str) else next(iter(suffix), "T1w")
        if self.kind == "one file":
            return f"{self.path}: one file, one visit"
        left_out, note = 0, ""
        if self.kind == "BIDS":
            visits, left_out = _bids_visits(Path(self.path), suffix)
        else:
            table = self.init_args["table"] or Path(self.path) / "visits.csv"
            rows = _rows(Path(table))
            visits = [row["subject"] for row in rows]
            flagged = sum(bool(row.get("flags")) for row in rows)
            note = f", {flagged} flagged (see the column flags)" if flagged else ""
        subjects = len(set(visits))
        counts = f"{len(visits)} visit{'s' * (len(visits) != 1)} of {subjects} subject{'s' * (subjects != 1)}"
        without = f" (without a {suffix} image)" if left_out else ""
        return f"{self.path}: {self.kind}, {counts}, {left_out} left out{without}{note}"


def is_prepared(root: str | Path | None) -> bool:
    """Whether ``lssl prepare`` wrote this folder."""
    return root is not None and (Path(root) / "dataset.json").is_file() and (Path(root) / "visits.csv").is_file()


def prepared_options(root: str | Path) -> dict[str, Any]:
    """The options with which a folder was prepared, from its ``dataset.json``: ``suffixes``, ``template`` and others.

    Args:
        root: the folder.

    Raises:
        InputError: if the file is damaged or of another kind.
    """
    path = Path(root) / "dataset.json"
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError):
        content = None
    options = content.get("options", {}) if isinstance(content, dict) else None
    suffixes = options.get("suffixes", []) if isinstance(options, dict) else None
    if not isinstance(suffixes, list) or not all(isinstance(suffix, str) for suffix in suffixes):
        raise InputError(f"{path} is damaged: it holds no options of `lssl prepare`; restore it, or prepare again.")
    return dict(options or {})


def recognise(path: str) -> Found:
    """Which datamodule reads a path.

    Args:
        path: a folder that ``lssl prepare`` wrote, a BIDS folder, a table of visits (CSV or TSV) or a NIfTI file.
    """
    place = Path(path)
    if place.is_dir():
        return _folder(path, place)
    if not place.is_file():
        raise InputError(f"There is no file or folder {path}.")
    if path.endswith(NIFTI):
        return Found(path, "one file", "NiftiDataModule", {"root": path, "table": None})
    if place.suffix not in (".csv", ".tsv"):
        raise InputError(f"{path} is no data: give a folder, a table (.csv, .tsv) or a NIfTI file (.nii, .nii.gz).")
    if is_prepared(place.parent):
        return Found(path, "table of prepared visits", "PreparedDataModule", {"root": str(place.parent), "table": path})
    return Found(path, "table", "NiftiDataModule", {"root": None, "table": path})


def _folder(path: str, place: Path) -> Found:
    if is_prepared(place):
        return Found(path, "prepared", "PreparedDataModule", {"root": path, "table": None})
    if "settings" in (read_json(place / "dataset.json") or {}):
        raise InputError(f"{path} has no visits.csv: its preparation was interrupted; run `lssl prepare` again.")
    if any(entry.name.startswith("sub-") and entry.is_dir() for entry in os.scandir(place)):
        return Found(path, "BIDS", "NiftiDataModule", {"root": path, "table": None})
    raise InputError(
        f"{path} is neither a folder that `lssl prepare` wrote (visits.csv, dataset.json) nor a BIDS folder (sub-*); "
        f"give one of these, a table of visits, or a NIfTI file."
    )


def _rows(path: Path) -> list[dict[str, str]]:
    """The lines of a table by lower-case column names."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        names = [name.strip().lower() for name in next(reader, [])]
        if "subject" not in names:
            raise InputError(f"The table {path} lacks the column subject; it has {', '.join(names)}.")
        return [dict(zip(names, row, strict=False)) for row in reader if any(row)]


def _bids_visits(root: Path, suffix: str) -> tuple[list[str], int]:
    """Subject of each visit that has an image, and the number of visits that have none."""
    subjects, without = [], 0
    for subject in _folders(root, "sub-"):
        sessions = _folders(root / subject, "ses-")
        for session in [*sessions, *[""] * ((root / subject / "anat").is_dir() or not sessions)]:
            anat = root / subject / session / "anat"
            names = os.listdir(anat) if anat.is_dir() else []
            if any(name.endswith(tuple(f"_{suffix}{end}" for end in NIFTI)) for name in names):
                subjects.append(subject)
            else:
                without += 1
    return subjects, without


def _folders(root: Path, prefix: str) -> Iterable[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.name.startswith(prefix) and entry.is_dir())
