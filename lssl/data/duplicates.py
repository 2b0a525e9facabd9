"""Finds the same scan under two names by its voxels; without torch.

If a training scan also occurs in the test split, every score is too good, and its name does not show it. Use::

    find_duplicates(table)    # groups of rows with the same voxels, for a report such as `lssl inspect`
    check_duplicates(table)   # refuses copies across splits, returns a sentence on the others (for `fit`, `benchmark`)

Both read the column ``voxel_hash`` where the table has one (``lssl prepare`` can write :func:`voxel_hash` of the raw
image there); otherwise they hash the files of the column ``image``. Hashes are kept by path, size and time of change in
``$XDG_CACHE_HOME/lssl/voxel_hashes.json``, so that a file is decompressed once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lssl.utils.errors import InputError
from lssl.utils.files import read_json, write_json

__all__ = ["check_duplicates", "find_duplicates", "voxel_hash"]

COLUMN = "voxel_hash"
THREADS = min(8, os.cpu_count() or 1)
_known: dict[str, dict[str, Any]] = {}


def voxel_hash(path: str | Path) -> str:
    """Hash of an image's decoded voxels; it does not depend on compression, header and orientation.

    The values (float32, after the header's scaling) are sorted before they are hashed, together with the sorted axis
    lengths. So a file keeps its hash when it is compressed again, given another affine, or stored in another
    orientation. Two scans have the same hash only if they hold the same values equally often, which noise rules out. A
    resampled copy, or one stored with other rounding, has another hash.

    Args:
        path: NIfTI file.

    Raises:
        InputError: if the file is missing, damaged, constant or not finite.
    """
    from lssl.data.nifti import read_image

    path = os.path.abspath(path)
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist; correct its path or remove its visit.")
    status = os.stat(path)
    now = {"size": status.st_size, "changed": status.st_mtime_ns}
    known = _known.get(path)
    if known and all(known.get(name) == value for name, value in now.items()):
        return str(known["hash"])
    voxels = read_image(path)[0]
    hashed = hashlib.blake2b(str(sorted(voxels.shape)).encode(), digest_size=12)
    hashed.update(np.sort(voxels + 0.0, axis=None).tobytes())  # + 0.0 turns −0 into 0
    _known[path] = {**now, "hash": hashed.hexdigest()}
    return hashed.hexdigest()


def find_duplicates(table: pd.DataFrame) -> list[list[int]]:
    """Groups of rows that hold the same scan, each sorted, in order of their first row.

    All channels are compared (``image``, ``image_1``, …). Only files whose axes have the same lengths are decompressed.
    A file that cannot be read is not reported here; training refuses it when it is read.

    Args:
        table: visits, with a column ``voxel_hash`` or ``image`` (paths). Without either there are no files to compare.
    """
    if COLUMN in table:
        hashes = table[COLUMN].fillna("").astype(str).tolist()
    elif channels := [column for column in table if re.fullmatch(r"image(_\d+)?", str(column))]:
        hashes = _hash_files([str(path) for column in channels for path in table[column].tolist()])
    else:
        return []
    rows: dict[str, list[int]] = defaultdict(list)
    for place, value in enumerate(hashes):
        if value and place % len(table) not in rows[value]:
            rows[value].append(place % len(table))
    groups = {tuple(sorted(group)): None for group in rows.values() if len(group) > 1}  # once, not once per channel
    return [list(group) for group in sorted(groups)]


def check_duplicates(table: pd.DataFrame) -> str:
    """Refuses a scan that occurs in two splits, and names visits of one split that share a scan.

    Args:
        table: visits with ``subject``, ``session``, ``split`` and what :func:`find_duplicates` needs.

    Returns:
        A sentence, or an empty text if no scan occurs twice.

    Raises:
        InputError: if a test scan is also used for training or validation, or a validation scan for training.
    """
    groups = find_duplicates(table)
    names = [
        f"{subject} {session}".strip() for subject, session in zip(table["subject"], table["session"], strict=True)
    ]
    for group in groups:
        splits = table["split"].iloc[group].astype(str).tolist() if "split" in table else []
        if len({*splits}) > 1:
            first, second = group[0], next(row for row, split in zip(group, splits, strict=True) if split != splits[0])
            raise InputError(
                f"{names[first]} ({splits[0]}) and {names[second]} ({table['split'].iat[second]}) are the same scan, "
                f"so that scores of held-out subjects would be too good; remove one of them, or give both one subject."
            )
    if not groups:
        return ""
    some = "; ".join(" = ".join(names[row] for row in group) for group in groups[:3])
    return f"the same scan under several names: {some}{'; …' if len(groups) > 3 else ''}"


def _hash_files(paths: list[str]) -> list[str]:
    """Hashes of the files whose shape occurs more than once, empty for the others. New hashes are stored."""
    with ThreadPoolExecutor(THREADS) as pool:
        shapes = list(pool.map(_shape, paths))
        often = Counter(shapes)
        wanted = sorted({path for path, shape in zip(paths, shapes, strict=True) if shape and often[shape] > 1})
        stored = _read_cache()
        found = dict(zip(wanted, pool.map(_hash_or_nothing, wanted), strict=True))
    if _known != stored:
        with contextlib.suppress(OSError):  # the cache only saves time
            write_json(_cache_file(), _known)
    return [found.get(path, "") for path in paths]


def _shape(path: str) -> tuple[int, ...]:
    """Sorted lengths of the axes; nothing where the header cannot be read."""
    from lssl.data.nifti import read_grid

    try:
        return tuple(sorted(read_grid(path).shape.tolist()))
    except InputError:
        return ()


def _hash_or_nothing(path: str) -> str:
    try:
        return voxel_hash(path)
    except InputError:
        return ""


def _cache_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "lssl" / "voxel_hashes.json"


def _read_cache() -> dict[str, dict[str, Any]]:
    """Loads the hashes that earlier processes stored."""
    content = read_json(_cache_file())
    stored = content if isinstance(content, dict) else {}
    for path, entry in stored.items():
        _known.setdefault(path, entry)
    return stored
