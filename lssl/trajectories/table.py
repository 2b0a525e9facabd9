"""What a prediction found of every visit, with what may confound it: one row per visit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lssl.data.sidecars import SidecarTable, normal_id, read_table
from lssl.runs.visit_log import VISITS
from lssl.utils.errors import InputError, nearest

__all__ = ["CONFOUNDS", "add_columns", "measures_of", "read_visits"]

KEYS = ["subject", "session"]
CONFOUNDS = ("site", "interval", "motion")
COMPONENTS = 3  # principal components of the embeddings
SUBJECT, SESSION = ("participant_id", "subject_id", "subject"), ("session_id", "session")


def read_visits(folder: Path) -> pd.DataFrame:
    """The visits of a folder of predictions, with their measures as columns.

    ``visits.tsv`` names the visits. ``volumes.csv`` gives a column ``STRUCTURE (ml)`` each. ``embeddings*.npz`` give,
    for the tap with the most channels, the first :data:`COMPONENTS` principal components over all visits, as
    ``TAP PC1 (SHARE %)`` with the share of the variance, and ``TAP change``: the distance from the subject's first
    visit. ``interval`` is the time since the subject's visit before, in years.

    Raises:
        InputError: if the folder holds no list of visits, or no measure.
    """
    if not (folder / VISITS).is_file():
        raise InputError(f"{folder} has no {VISITS}; predict again: older predictions lack it.")
    visits = pd.read_csv(folder / VISITS, sep="\t", dtype=dict.fromkeys((*KEYS, "site"), str))
    visits[KEYS] = visits[KEYS].fillna("")
    if (folder / "volumes.csv").is_file():
        volumes = pd.read_csv(folder / "volumes.csv", dtype=dict.fromkeys(KEYS, str))
        volumes[KEYS] = volumes[KEYS].fillna("")
        wide = volumes.pivot_table(index=KEYS, columns="structure", values="mm3", sort=False) / 1000
        visits = visits.merge(wide.add_suffix(" (ml)").reset_index(), how="left", on=KEYS)
    files = sorted(folder.glob("embeddings*.npz"))
    if files:
        visits = visits.merge(_components(files, visits), how="left", on=KEYS)
    if not measures_of(visits):
        raise InputError(f"{folder} has neither volumes.csv nor embeddings.npz; predict again.")
    visits = visits.sort_values(["subject", "years"], kind="stable").reset_index(drop=True)
    visits["interval"] = visits.groupby("subject")["years"].diff()
    return visits


def measures_of(visits: pd.DataFrame) -> list[str]:
    """The columns that are measures."""
    return [str(name) for name in visits if str(name).endswith(("(ml)", "%)", " change"))]


def _components(files: Sequence[Path], visits: pd.DataFrame) -> pd.DataFrame:
    loaded = [np.load(path) for path in files]
    names = pd.DataFrame({key: np.concatenate([one[key].astype(str) for one in loaded]) for key in KEYS})
    taps = [name for name in loaded[0].files if loaded[0][name].ndim == 2]
    tap = max(taps, key=lambda name: loaded[0][name].shape[1])
    features = np.concatenate([one[tap] for one in loaded]).astype(np.float64)
    names["row"] = np.arange(len(names))
    table = visits[[*KEYS, "years"]].merge(names.drop_duplicates(KEYS), on=KEYS)
    features = features[table.pop("row")]
    table["place"] = np.arange(len(table))
    centred = features - features.mean(0)
    left, scale, right = np.linalg.svd(centred, full_matrices=False)
    share = 100 * scale**2 / max(float((scale**2).sum()), 1e-30)
    for number in range(min(COMPONENTS, len(scale))):
        sign = np.sign(right[number, np.abs(right[number]).argmax()])  # a component's sign is arbitrary
        table[f"{tap} PC{number + 1} ({share[number]:.0f} %)"] = sign * left[:, number] * scale[number]
    earliest = table.sort_values("years", kind="stable").groupby("subject")["place"].transform("first")
    table[f"{tap} change"] = np.linalg.norm(features - features[earliest.sort_index()], axis=1)
    return table.drop(columns=["place", "years"])


def add_columns(visits: pd.DataFrame, wanted: Sequence[str], source: Path | None) -> pd.DataFrame:
    """Adds columns of a table of participants, or of visits, to the visits.

    Args:
        visits: with ``subject`` and ``session``.
        wanted: names of columns, in any case; those that the visits have are left as they are.
        source: TSV (participants.tsv) or CSV.

    Raises:
        InputError: for a column that there is not.
    """
    missing = [name for name in wanted if name not in visits]
    if not missing:
        return visits
    if source is None or not source.is_file():
        raise InputError(
            f"There is no table with a column {missing[0]}: {source or 'the data'} does not exist; name one by "
            "--participants FILE."
        )
    table = _read(source)
    known = sorted({column for row in table.rows for column in row})
    subject = next((name for name in SUBJECT if name in known), None)
    if subject is None:
        raise InputError(f"{source} has no column participant_id; it has {', '.join(known[:10])}.")
    session = next((name for name in SESSION if name in known), None)
    result = visits.copy()
    for name in missing:
        if name.lower() not in known:
            raise InputError(f"{source} has no column {name}{nearest(name, known)}")
        cells = {
            (normal_id(row[subject], "sub-"), normal_id(row.get(session or "", ""), "ses-")): row.get(name.lower())
            for row in table.rows
            if subject in row
        }
        keys = [
            (normal_id(one, "sub-"), normal_id(other, "ses-"))
            for one, other in zip(visits["subject"], visits["session"], strict=True)
        ]
        result[name] = pd.Series([cells.get(key, cells.get((key[0], ""))) for key in keys], dtype=object)
    return result


def _read(source: Path) -> SidecarTable:
    if source.suffix.lower() != ".csv":
        return read_table(source)
    rows = pd.read_csv(source, dtype=str, skipinitialspace=True)
    rows.columns = pd.Index([str(name).strip().lower() for name in rows])
    return SidecarTable(
        source, [{str(key): str(text) for key, text in row.dropna().items()} for _, row in rows.iterrows()]
    )
