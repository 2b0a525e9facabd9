"""The visits of nnssl's ``pretrain_data.json`` (MIC-DKFZ/nnssl, ``documentation/dataset_format.md``).

The file holds a collection: ``datasets`` → ``subjects`` → ``sessions`` → ``images``. An image has ``image_path``,
``modality`` and, optionally, ``associated_masks`` (``anatomy_mask``, ``anonymization_mask``). A path may start with an
environment variable, as in ``$nnssl_raw/…``. ``subject_info``, ``session_info`` and ``image_info`` hold whatever the
author of the file chose to note; only what :func:`lssl.data.times.family` knows as a time is taken from them.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lssl.data.pairs import count
from lssl.data.times import family
from lssl.utils.errors import InputError

__all__ = ["nnssl_table"]

READABLE = (".nii", ".nii.gz", ".mgz", ".mgh")

Visit = tuple[dict[str, Any], list[Mapping[str, Any]]]
"""Cells of a visit that do not depend on the modality, and its images."""


def nnssl_table(path: Path, suffixes: Sequence[str] = ("T1w",)) -> tuple[pd.DataFrame, list[str]]:
    """The visits that have an image of every modality.

    The anatomy mask becomes the mask of the foreground; the anonymization mask is not used. Of several images of one
    modality in a session, the last by name is taken. An age in ``subject_info`` of a subject with several sessions is
    the age at the first one, as in BIDS. With several datasets, a subject's name starts with its dataset's, and the
    column ``site`` holds the dataset.

    Args:
        path: the JSON file; relative paths in it start from its folder.
        suffixes: the modalities, in any case; one channel each.

    Returns:
        A table as :func:`lssl.data.tables.csv_table` reads it, and notes on what was left out.
    """
    visits = list(_visits(_read(path), path))
    modalities = Counter(str(image.get("modality")) for _, images in visits for image in images)
    known = {name.lower() for name in modalities}
    for suffix in suffixes:
        if suffix.lower() not in known:
            held = ", ".join(f"{name} ({number} images)" for name, number in modalities.most_common(8))
            raise InputError(f"{path} has no image of modality {suffix}; name others with --suffix: {held or 'none'}.")
    rows, left, several = [], Counter[str](), 0
    for cells, images in visits:
        row, why, chosen = _row(cells, images, suffixes, path)
        several += chosen
        if why:
            left[why] += 1
        else:
            rows.append(row)
    notes = [f"{count(number, 'session')} left out: {why}" for why, number in left.most_common()]
    if not rows:
        raise InputError(f"{path} has no session that can be used ({'; '.join(notes)}).")
    if several:
        notes.append(f"{count(several, 'choice')} among several images of a modality, each the last by name")
    table = pd.DataFrame(rows)
    unmasked = int((table["mask"] == "").sum())
    if unmasked:
        notes.append(f"{count(unmasked, 'visit')} without an anatomy mask that exists; the head is found instead")
    return table, notes


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({' '.join(str(error).split())}).") from None
    if not isinstance(content, dict) or not isinstance(content.get("datasets"), dict):
        raise InputError(f"{path} is no pretrain_data.json of nnssl: it has no mapping 'datasets'.")
    return content


def _visits(content: Mapping[str, Any], path: Path) -> Iterator[Visit]:
    """Every session of the collection."""
    datasets = content["datasets"]
    for dataset, held in datasets.items():
        for subject, person in _mapping(held, "subjects", f"dataset {dataset}", path).items():
            sessions = _mapping(person, "sessions", f"subject {subject}", path)
            for session, scan in sessions.items():
                where = f"session {session} of subject {subject}"
                images = scan.get("images") if isinstance(scan, dict) else None
                if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
                    raise InputError(f"{path} is damaged: {where} has no list 'images'.")
                name = subject if len(datasets) == 1 else f"{dataset}_{subject}"
                site = {} if len(datasets) == 1 else {"site": dataset}
                times = _times(person.get("subject_info"), len(sessions) > 1) | _times(scan.get("session_info"))
                yield {"subject": name, "session": session, **site, **times}, images


def _mapping(node: Any, key: str, where: str, path: Path) -> dict[str, Any]:
    found = node.get(key) if isinstance(node, dict) else None
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: {where} has no mapping '{key}'.")
    return found


def _times(info: Any, at_baseline: bool = False) -> dict[str, Any]:
    """Entries that say when a visit was; of a subject with several sessions, ages are those at the baseline."""
    found = {}
    for key, value in (info or {}).items() if isinstance(info, dict) else ():
        name = f"baseline_{key}" if at_baseline and family(key)[0] == "age" else key
        if family(name)[0] and not isinstance(value, (dict, list)) and value is not None:
            found[name.lower()] = value
    return found


def _row(
    cells: dict[str, Any], images: Sequence[Mapping[str, Any]], suffixes: Sequence[str], path: Path
) -> tuple[dict[str, Any], str, int]:
    """The visit's row, the reason if it is left out, and in how many modalities an image had to be chosen."""
    row, chosen = dict(cells), 0
    for suffix in suffixes:
        alike = [image for image in images if str(image.get("modality")).lower() == suffix.lower()]
        if not alike:
            return row, f"no {suffix} image", chosen
        image = max(alike, key=lambda image: _natural(str(image.get("name") or image.get("image_path"))))
        chosen += len(alike) > 1
        file = _resolved(image.get("image_path"), path)
        if not file.endswith(READABLE):
            return row, f"its image is no NIfTI file ({Path(file).suffix or 'no ending'}); convert it", chosen
        if not os.path.isfile(file):
            return row, f"its image does not exist, such as {file}", chosen
        row["image" if len(suffixes) == 1 else suffix] = file
        if suffix == suffixes[0]:
            row |= _times(image.get("image_info"))
            mask = _resolved((image.get("associated_masks") or {}).get("anatomy_mask"), path)
            row["mask"] = mask if os.path.isfile(mask) else ""
    return row, "", chosen


def _resolved(written: Any, path: Path) -> str:
    """The file that a path of the JSON names; empty if it names none."""
    if not written:
        return ""
    text = str(written)
    if variable := re.match(r"\$(\w+)", text):
        if variable[1] not in os.environ:
            raise InputError(f"{path} names {text}, but the environment variable {variable[1]} is not set; set it.")
        text = os.environ[variable[1]].rstrip("/") + text[variable.end() :]
    return os.path.normpath(os.path.join(os.path.abspath(path.parent), text))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part or 0), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
