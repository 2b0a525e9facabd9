"""What there is to prepare: the visits of a BIDS folder with all their files, by subject."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lssl.data.bids import match_files
from lssl.data.channels import channel_table
from lssl.data.pairs import count, order_notes, order_visits
from lssl.data.partial import channel_files, channel_notes, keeps_partial
from lssl.data.tables import csv_table
from lssl.data.usable import without_visits
from lssl.utils.errors import InputError

__all__ = ["CohortSubject", "Options", "Session", "add_overlays", "find_subjects"]

AUTO = "auto"
MASKS, LABELS = "desc-brain_mask", "dseg"
MOST = 3  # patterns that are proposed where files of several kinds match


@dataclass(frozen=True)
class Options:
    """How a cohort is prepared; see ``lssl prepare --help``.

    Attributes:
        suffixes: image suffixes, the channels of a visit; the first one is registered between visits.
        select: which image of a visit is taken, see :func:`lssl.data.selection.choose`.
        spacing: mm of the isotropic grid.
        transform: ``rigid`` or ``affine``, between visits.
        n4: whether N4 evens out the bias field.
        masks: pattern of brain or head masks, ``auto`` or ``none``.
        labels: pattern of label maps, ``auto`` or ``none``.
        template: image whose space the half-way frame is brought into by an affine map.
        margin: mm kept around the foreground.
        floor: correlation with the other visits below which a visit is flagged.
        nonrigid: whether fields say how tissue moved between visits; images stay as they are.
        exclude: subjects and visits that are left out, see :func:`lssl.data.usable.without_visits`.
        missing_channels: whether visits that lack some of the suffixes are left out (``drop``) or kept (``keep``).
    """

    suffixes: tuple[str, ...] = ("T1w",)
    select: str = ""
    spacing: float = 1.0
    transform: str = "rigid"
    n4: bool = False
    masks: str = AUTO
    labels: str = AUTO
    template: str | None = None
    margin: float = 8.0
    floor: float = 0.5
    nonrigid: bool = False
    exclude: tuple[str, ...] = ()
    missing_channels: str = "drop"


@dataclass
class Session:
    """One visit: paths of the images that it has, by suffix, and of its mask and label map (empty if none)."""

    name: str
    images: dict[str, str]
    mask: str = ""
    label: str = ""


@dataclass
class CohortSubject:
    """A subject and its visits, in time order."""

    name: str
    sessions: list[Session] = field(default_factory=list)

    def files(self) -> list[str]:
        """Every file that is read."""
        found: list[str] = []
        for session in self.sessions:
            found += [*session.images.values(), session.mask, session.label]
        return sorted({path for path in found if path})


def find_subjects(root: Path, options: Options) -> tuple[list[CohortSubject], pd.DataFrame, list[str]]:
    """The subjects of a BIDS folder or a table of visits, their visit table, and remarks on what was left out.

    A visit that lacks one of the suffixes is left out and counted, unless the options keep it.
    """
    suffixes, partial = options.suffixes, keeps_partial(options.missing_channels)
    listed = root.is_file()
    if listed and options.select:
        raise InputError(f"{root} is a table, which names the images of a visit; leave --select out.")
    if listed:
        table, notes = csv_table(root, suffixes=suffixes, partial=partial)
    else:
        table, notes = channel_table(root, suffixes, None, None, options.select, partial)
    table, excluded = without_visits(table, options.exclude)
    notes += excluded
    files = channel_files(table, len(suffixes))
    if partial:
        notes += channel_notes(table, files != "", suffixes, training=True)
    folder = root.parent if listed else root
    table = table.drop(columns="image").assign(**{f"image_{number}": paths for number, paths in enumerate(files.T)})
    notes += add_overlays(folder, table, options.masks, options.labels)[0]
    table = order_visits(table)
    subjects: dict[str, CohortSubject] = {}
    for row in _rows(table):
        images = {suffix: path for number, suffix in enumerate(suffixes) if (path := row[f"image_{number}"])}
        session = Session(row["session"], images, row["mask"], row["label"])
        subjects.setdefault(row["subject"], CohortSubject(row["subject"])).sessions.append(session)
    for name in subjects:
        if not re.fullmatch(r"[\w.+@ -]+", name) or name.startswith("."):
            raise InputError(f"The subject {name!r} cannot be the name of a file; rename it in {root}.")
    if unknown := int(np.isnan(table["time"].to_numpy(float)).sum()):
        notes.append(f"{count(unknown, 'visit')} without a time (no date, age, or label such as ses-M012)")
    return list(subjects.values()), table, notes + order_notes(table)


def add_overlays(
    folder: Path, table: pd.DataFrame, masks: str = AUTO, labels: str = AUTO
) -> tuple[list[str], dict[str, list[str]]]:
    """Fills the columns mask and label of a visit table that names none.

    Args:
        folder: the BIDS folder, or that of the table.
        table: visits with subject, session, mask and label; it is changed.
        masks: pattern of masks below the folder, ``auto`` or ``none``.
        labels: pattern of label maps, likewise.

    Returns:
        Remarks on files that are ambiguous, and by option (``labels``) the patterns that would choose among them.
    """
    notes, choices = [], {}
    for column, pattern, kind in (("mask", masks, MASKS), ("label", labels, LABELS)):
        if column in table and table[column].any():
            continue
        if pattern == AUTO:
            table[column], several, ambiguous = _derivatives(folder, table, kind)
            if several:
                what = {"mask": "masks", "label": "label maps"}[column]
                choices[f"{column}s"] = patterns = [pattern for pattern, _ in several.most_common(MOST)]
                notes.append(
                    f"{count(ambiguous, 'visit')} with several {what}, none of which is taken; "
                    f"say which by --{column}s: {' or '.join(patterns)}"
                )
        else:
            table[column] = "" if pattern == "none" else match_files(folder, pattern, table, f"{column}s")
    return notes, choices


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _derivatives(root: Path, table: pd.DataFrame, ending: str) -> tuple[list[str], Counter[str], int]:
    """The one file of each visit below ``derivatives/`` that ends so, in the image's own space.

    A file of the session is preferred to one of the subject; if several match, none is taken.

    Returns:
        A path per visit or nothing, patterns of the files among which none was taken, and the number of those visits.
    """
    found, several, ambiguous = [], Counter[str](), 0
    pipelines = sorted(glob.glob("derivatives/*/", root_dir=root))
    for subject, session in zip(table["subject"], table["session"], strict=True):
        hits: list[str] = []
        for place in dict.fromkeys((os.path.join(subject, session), subject)):
            names = [
                os.path.join(pipeline, name)
                for pipeline in pipelines
                for name in glob.glob(f"{place}/anat/*{ending}.nii*", root_dir=root / pipeline)
                if "_space-" not in name
            ]
            hits = hits or sorted(names)
        if len(hits) > 1:
            several.update(_pattern(name, subject, session) for name in hits)
            ambiguous += 1
        found.append(os.path.join(root, hits[0]) if len(hits) == 1 else "")
    return found, several, ambiguous


def _pattern(name: str, subject: str, session: str) -> str:
    """What ``--labels`` takes to choose this file, and those of its kind of other visits."""
    name = name.replace("{", "{{").replace("}", "}}").replace(subject, "{subject}")
    return name.replace(session, "{session}") if session else name
