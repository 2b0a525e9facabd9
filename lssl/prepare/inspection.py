"""What a BIDS folder or a prepared folder holds, and which visits look wrong.

Headers, masks and label maps of all visits are read. Voxels of images are read only of some subjects, as that takes
seconds each, and of files with the shape of another one, to find the same scan under two names.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lssl.data.bids import bids_table
from lssl.data.duplicates import find_duplicates
from lssl.data.pairs import build_pairs, count, order_notes, order_visits
from lssl.data.partial import channel_notes, prepared_channels
from lssl.data.recognise import prepared_options
from lssl.data.tables import csv_table, quality_table, with_sizes
from lssl.prepare.quality import THICKEST, other_person, too_small
from lssl.utils.errors import InputError
from lssl.utils.files import read_json

if TYPE_CHECKING:
    from lssl.prepare.samples import Sample

__all__ = ["Inspection", "inspect_folder", "proposed_spacing"]

EDGES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)  # years; the last class is open
APART = 3.0  # mm between visits on one grid that should be aligned
# Of one core of an EPYC server, for heads of 320×320×40 voxels: two pairs and four visits took 19 s.
SECONDS_PER_PAIR, SECONDS_PER_VISIT = 5.5, 2.0
STORED = 0.56  # of two bytes a voxel


@dataclass
class Inspection:
    """Everything that is known of a folder, as plain values (see :meth:`as_json`).

    ``spacing`` is what its preparation would bring it to, in mm; ``None`` for a prepared folder. ``choices`` has
    patterns for ``--masks`` and ``--labels``, where several files match and none is taken.
    """

    folder: str
    kind: str
    table: pd.DataFrame
    channels: list[str]
    left_out: list[str] = field(default_factory=list)
    shapes: Counter[str] = field(default_factory=Counter)
    spacings: Counter[str] = field(default_factory=Counter)
    orientations: Counter[str] = field(default_factory=Counter)
    brightest: list[float] = field(default_factory=list)
    looked_at: int = 0
    suspicious: list[tuple[str, str]] = field(default_factory=list)
    spacing: float | None = None
    gigabytes: float = 0.0
    hours: float | None = None
    overlays: dict[str, str] = field(default_factory=dict)
    choices: dict[str, list[str]] = field(default_factory=dict)
    pictures: dict[str, Sample] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        table = self.table
        visits = table.groupby("subject").size()
        pairs = {policy: build_pairs(table, policy, 0.0, None).pairs for policy in ("any", "consecutive", "baseline")}
        interval = self.intervals()
        bright = np.array(self.brightest)
        return {
            "folder": self.folder,
            "kind": self.kind,
            "channels": self.channels,
            "subjects": int(table["subject"].nunique()),
            "visits": len(table),
            "subjects_by_visits": {str(k): int(v) for k, v in visits.value_counts().sort_index().items()},
            "pairs": {policy: len(rows) for policy, rows in pairs.items()},
            "interval_years": {
                "from": list(EDGES),
                "pairs": self.histogram().tolist(),
                "median": None if not len(interval) else round(float(np.median(interval)), 3),
            },
            "shapes": dict(self.shapes),
            "spacings_mm": dict(self.spacings),
            "orientations": dict(self.orientations),
            "brightest_99.9": None
            if not len(bright)
            else {"lowest": float(bright.min()), "median": float(np.median(bright)), "highest": float(bright.max())},
            "without_age": int(table["age"].isna().sum()),
            "without_time": int(table["time"].isna().sum()),
            "left_out": self.left_out,
            "subjects_looked_at": self.looked_at,
            "not_read": self.not_read(),
            "suspicious": [{"visit": visit, "reason": reason} for visit, reason in self.suspicious],
            "masks": self.overlays.get("mask", ""),
            "labels": self.overlays.get("label", ""),
            "choices": self.choices,
            "prepared_spacing_mm": self.spacing,
            "gigabytes": round(self.gigabytes, 6),
            "hours_with_one_worker": self.hours,
        }

    def not_read(self) -> str:
        """What was not looked at, in words; empty if all was."""
        every = int(self.table["subject"].nunique())
        rest = every - self.looked_at
        text = f"voxels of the images of {count(rest, 'subject')} of {every} were not read; --all reads them"
        return text if rest > 0 else ""

    def intervals(self) -> np.ndarray:
        """Years between the visits of every pair of policy ``any``, where known."""
        pairs = build_pairs(self.table, "any", 0.0, None).pairs
        time = self.table["time"].to_numpy(float)
        interval = time[pairs[:, 1]] - time[pairs[:, 0]]
        return interval[~np.isnan(interval)]

    def histogram(self) -> np.ndarray:
        """Pairs in each class of :data:`EDGES`."""
        return np.histogram(self.intervals(), [*EDGES, np.inf])[0]


def inspect_folder(
    folder: Path,
    suffix: str = "T1w",
    subjects: int = 10,
    spacing: float | None = None,
    select: str = "",
    everything: bool = False,
) -> Inspection:
    """Looks at a folder or a table.

    Args:
        folder: a BIDS folder, a table of visits, or a folder that ``lssl prepare`` wrote.
        suffix: of the images in a BIDS folder.
        subjects: of how many subjects of a BIDS folder the voxels of images are read.
        spacing: mm of the voxels for which size and time of a cache are estimated; ``None`` proposes one, see
            :func:`proposed_spacing`.
        select: which image of a visit is taken, see :func:`lssl.data.selection.choose`.
        everything: reads every file once, see :mod:`lssl.data.usable`.
    """
    if not folder.is_dir() and folder.suffix not in (".csv", ".tsv"):
        raise InputError(f"There is no folder {folder}; name a BIDS folder or one that `lssl prepare` wrote.")
    prepared = (folder / "visits.csv").is_file() and (folder / "dataset.json").is_file()
    if prepared or "settings" in (read_json(folder / "dataset.json") or ()):
        return _prepared(folder, prepared_options(folder), everything)
    return _raw(folder, suffix, subjects, spacing, select, everything)


# --- prepared ---------------------------------------------------------------------------------------------------------


def _prepared(folder: Path, options: dict[str, Any], everything: bool) -> Inspection:
    path = folder / "visits.csv"
    if not path.is_file():
        raise InputError(f"{folder} has no visits.csv: its preparation was interrupted; run `lssl prepare` again.")
    table, notes = csv_table(path, folder)
    if table.empty:
        raise InputError(f"{folder} holds no finished visits yet; run `lssl prepare` again.")
    table = with_sizes(table, path)
    table = order_visits(table.merge(quality_table(folder / "quality.csv"), how="left", on=["subject", "session"]))
    suffixes, present = prepared_channels(table, options.get("suffixes", ["T1w"]))
    lacking = [] if present is None else channel_notes(table, present, suffixes)
    report = Inspection(str(folder), "prepared", table, suffixes, notes + order_notes(table) + lacking)
    sizes = table[["size_d", "size_h", "size_w"]].astype(str).agg("×".join, axis=1)
    report.shapes, report.spacings = Counter(sizes), Counter(f"{float(value):.3g}" for value in table["spacing"])
    report.orientations = Counter({"RAS": len(table)})
    report.brightest = table["raw_high"].astype(float).tolist()
    report.gigabytes = float(table["bytes"].astype(float).sum()) / 1e9
    names = _names(table)
    flags = table["flags"].fillna("") if "flags" in table else pd.Series("", index=table.index)
    report.suspicious = [(name, text) for name, text in zip(names, flags, strict=True) if text]
    report.suspicious += _repeated(table)
    missing = [image for image in table["image"] if not os.path.exists(image)]
    report.suspicious += [
        (name, "its file is missing; run `lssl prepare` again")
        for name, image in zip(names, table["image"], strict=True)
        if image in missing
    ]
    report.overlays = {
        "mask": f"{count(int((table['foreground'] == 'mask').sum()), 'visit')} of {len(table)}",
        "label": f"{count(int(table['labelled'].astype(bool).sum()), 'visit')} of {len(table)}",
    }
    if everything:
        from lssl.prepare.contents import unusable

        report.suspicious += unusable(
            table.assign(image=table["image"].where(~table["image"].isin(missing), "")), "image", "stored"
        )
    report.looked_at = int(table["subject"].nunique()) if everything else 0
    return report


def _names(table: pd.DataFrame) -> list[str]:
    return [f"{subject} {session}".strip() for subject, session in zip(table["subject"], table["session"], strict=True)]


def _repeated(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Visits whose scan is that of an earlier one, whatever its compression, header and axes."""
    names = _names(table)
    return [
        (names[row], f"the same scan as {names[first]}") for first, *others in find_duplicates(table) for row in others
    ]


# --- BIDS -------------------------------------------------------------------------------------------------------------


def proposed_spacing(grids: Sequence[Any]) -> float:
    """Side in mm of the isotropic voxels that suit images: 1, or the median of their finest sides, if that is more.

    Smaller voxels than were measured cost memory and show nothing more. Finer images are usually brought to 1 mm.

    Args:
        grids: of the images; ``None`` where one cannot be read.
    """
    finest = [np.linalg.norm(grid.affine[:3, :3], axis=0).min() for grid in grids if grid is not None]
    return max(1.0, round(float(np.median(finest)), 1)) if finest else 1.0


def _raw(folder: Path, suffix: str, subjects: int, spacing: float | None, select: str, everything: bool) -> Inspection:
    """Of a BIDS folder, or of a table of visits."""
    given, folder = folder, folder.absolute()  # what is kept of a file is kept under its absolute path
    listed = folder.suffix in (".csv", ".tsv") and not folder.is_dir()
    table, left_out = csv_table(folder) if listed else bids_table(folder, suffix, select=select)
    table = order_visits(table)
    left_out += order_notes(table)
    report = Inspection(str(given), "table" if listed else "BIDS", table, [suffix], left_out)
    names, images = _names(table), table["image"].tolist()
    grids = _headers(report, names, images)
    report.spacing = spacing = spacing or proposed_spacing(grids)
    _refuse_moved(report, table, grids)
    report.suspicious += _repeated(table)
    chosen = _evenly(list(dict.fromkeys(table["subject"])), subjects)
    boxes = [_look(report, table, subject, grids) for subject in chosen]
    report.looked_at = int(table["subject"].nunique()) if everything else len(chosen)
    _contents(report, folder.parent if listed else folder, grids, everything)
    volume = [size for found in boxes for size in found]
    typical = float(np.median(volume)) if volume else 180.0 * 220.0 * 190.0  # mm³ of an adult head and its margin
    report.gigabytes = len(table) * typical / spacing**3 * 2 * STORED / 1e9
    neighbours = sum(min(later, 3) for number in table.groupby("subject").size() for later in range(number))
    report.hours = round((neighbours * SECONDS_PER_PAIR + len(table) * SECONDS_PER_VISIT) / 3600, 2)
    return report


def _contents(report: Inspection, folder: Path, grids: list[Any], everything: bool) -> None:
    """Masks and label maps of all visits; with ``everything`` all images, too.

    What an earlier look at everything found in images that have not changed is reported again.
    """
    from lssl.prepare.contents import inspect_overlays, unusable

    report.overlays, found, notes, report.choices = inspect_overlays(folder, report.table, grids)
    found += unusable(report.table, "image", "image", read=everything)
    report.suspicious = list(dict.fromkeys([*report.suspicious, *found]))
    report.left_out += notes


def _headers(report: Inspection, names: list[str], images: list[str]) -> list[Any]:
    """Notes shapes, spacings and orientations; the canonical grid of each image, ``None`` where it cannot be read."""
    import nibabel as nib

    from lssl.data.header import knows_orientation
    from lssl.data.nifti import read_grid

    grids: list[Any] = []
    for name, path in zip(names, images, strict=True):
        try:
            grid = read_grid(path, strict=False)
            image: Any = nib.load(path)
        except InputError as error:
            report.suspicious.append((name, str(error)))
            grids.append(None)
            continue
        grids.append(grid)
        steps = np.linalg.norm(grid.affine[:3, :3], axis=0)
        report.shapes["×".join(map(str, grid.shape))] += 1
        report.spacings["×".join(f"{value:.3g}" for value in steps)] += 1
        known = knows_orientation(image)
        report.orientations["".join(nib.aff2axcodes(image.affine)) if known else "none"] += 1
        if not known:
            report.suspicious.append((name, "no orientation in its header: left and right cannot be told apart"))
        unit = image.header.get_xyzt_units()[0] if hasattr(image.header, "get_xyzt_units") else "mm"
        if unit in ("meter", "micron"):
            report.suspicious.append((name, f"lengths in its header are in {unit}; they are read as such"))
        if steps.max() >= max(THICKEST, 2 * steps.min()):
            report.suspicious.append((name, f"slices of {steps.max():.3g} mm"))
    return grids


def _refuse_moved(report: Inspection, table: pd.DataFrame, grids: list[Any]) -> None:
    """Subjects whose visits do not share a grid, in one line: before preparation that is the rule."""
    moved = []
    for subject, rows in table.groupby("subject").indices.items():
        known = [grids[row] for row in rows if grids[row] is not None]
        if any(not grid.same(known[0]) for grid in known[1:]):
            moved.append(str(subject))
    if moved:
        some = ", ".join(moved[:3]) + (", …" if len(moved) > 3 else "")
        text = f"{count(len(moved), 'subject')} with visits on different grids ({some}): `lssl prepare` aligns them"
        report.left_out.append(text)


def _evenly(names: list[str], number: int) -> list[str]:
    if number >= len(names):
        return names
    return [names[round(place)] for place in np.linspace(0, len(names) - 1, number)] if number > 0 else []


def _look(report: Inspection, table: pd.DataFrame, subject: str, grids: list[Any]) -> list[float]:
    """Reads a subject's voxels; notes what is wrong, and the volume in mm³ of each head's box."""
    from lssl.data.nifti import automatic_foreground, intensity_range, read_image
    from lssl.prepare.people import same_person
    from lssl.prepare.register import roughly
    from lssl.prepare.samples import raw_sample
    from lssl.prepare.transforms import displacement
    from lssl.prepare.volumes import Volume

    volumes: list[tuple[int, Any]] = []
    for row in np.flatnonzero((table["subject"] == subject).to_numpy()).tolist():
        if grids[row] is None:
            continue
        name = _names(table.iloc[[row]])[0]
        try:
            voxels, affine = read_image(str(table["image"].iat[row]))
        except InputError as error:
            if "nothing of its orientation" not in str(error):  # the header's row has said so
                report.suspicious.append((name, str(error)))
            continue
        volume = Volume(voxels, affine, automatic_foreground(voxels))
        if doubt := too_small(float(volume.foreground.sum() * volume.spacing().prod()) / 1000):
            report.suspicious.append((name, doubt))
        else:
            volumes.append((row, volume))
        high = intensity_range(voxels, volume.foreground)[1]
        report.brightest.append(high)
        report.pictures[name] = raw_sample(voxels, affine, high, str(table["image"].iat[row]))
    for (before, one), (row, two) in pairwise(volumes):
        name, matrix = _names(table.iloc[[row]])[0], roughly(one, two)
        apart = displacement(matrix, np.eye(4), one.points())
        if doubt := other_person(same_person(one, two, matrix), "the visit before"):
            report.suspicious.append((name, doubt))
        elif grids[row].same(grids[before]) and apart > APART:
            report.suspicious.append((name, f"not aligned with the visit before, by about {apart:.0f} mm"))
    return [volume.box_mm3() for _, volume in volumes]
