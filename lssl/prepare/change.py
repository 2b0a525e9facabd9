"""``lssl prepare --nonrigid``: fields, maps of local volume change and percent volume change of a subject's visits."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd

from lssl.data.fields import VisitField, write_field
from lssl.data.nifti import scale, without_hot_voxels
from lssl.prepare.cohort import Options
from lssl.prepare.looks import windowed
from lssl.prepare.picture import draw_change
from lssl.prepare.scans import Scans
from lssl.prepare.velocity import compose, determinant, exponential, knot_step, on_grid, velocities
from lssl.prepare.volumes import FrameGrid, Volume, common_grid, resample, resample_label, resample_mask
from lssl.utils.files import atomic_write

__all__ = ["FINEST", "Change", "change_rows", "field_between", "measure_change", "tissue_fields", "write_changes"]

FINEST = 2.0  # mm: change is smooth, and finer voxels show the same
FIGURES = ("ml", "percent_change")
DARK_FLUID = ("T1w", "FLAIR")  # contrasts in which fluid is darker than half the brain's brightness


class Change:
    """The fields of a subject's visits on one grid.

    Args:
        grid: of the images that they were found in.
        images: ``(D, H, W)`` of each visit on it.
        masks: ``(D, H, W)`` bool, the foreground of each visit.
    """

    def __init__(self, grid: FrameGrid, images: list[np.ndarray], masks: list[np.ndarray]) -> None:
        self.grid, self.images, self.factor = grid, images, knot_step(grid.spacing)
        self.head = np.any(masks, 0)
        velocity = velocities(images, masks, grid.spacing)
        self.knot = grid.spacing * self.factor
        self.to_visit = [exponential(field / self.knot) for field in velocity]
        self.from_visit = [exponential(-field / self.knot) for field in velocity]

    def stored(self, visit: int) -> VisitField:
        """What is kept of a visit."""
        affine = np.diag([self.knot, self.knot, self.knot, 1.0])
        affine[:3, 3] = self.grid.origin
        return VisitField(self.to_visit[visit] * self.knot, self.from_visit[visit] * self.knot, affine)

    def between(self, first: int, second: int) -> np.ndarray:
        """Displacement ``(3, D, H, W)`` in mm of the tissue from one visit to another, on the grid."""
        if first == second:
            return np.zeros((3, *self.grid.size), np.float32)
        coarse = compose(self.to_visit[second], self.from_visit[first])
        return on_grid(coarse, self.grid.size, self.factor) * np.float32(self.knot)

    def volumes(self, first: int, second: int) -> np.ndarray:
        """Factor ``(D, H, W)`` of the volume at each place of one visit, until the other."""
        return determinant(self.between(first, second), self.grid.spacing)


def tissue_fields(volumes: Sequence[Volume], maps: Sequence[np.ndarray], spacing: float, margin: float) -> Change:
    """What moved between rigidly aligned visits.

    Args:
        volumes: the visits.
        maps: frame → each visit.
        spacing: mm of the prepared voxels; the fields are found on voxels of :data:`FINEST` mm or more.
        margin: mm around the foreground.
    """
    grid = common_grid(list(volumes), list(maps), max(FINEST, spacing), margin)
    images, masks = [], []
    for volume, matrix in zip(volumes, maps, strict=True):
        mask = resample_mask(volume.foreground, volume.affine, grid, matrix)
        outside = 0.0 if volume.voxels.min() >= 0 else float(volume.voxels.min())
        images.append(scale(without_hot_voxels(resample(volume, grid, matrix, outside)), mask))
        masks.append(mask)
    return Change(grid, images, masks)


def field_between(first: VisitField, second: VisitField) -> np.ndarray:
    """Displacement ``(3, D, H, W)`` in mm of the tissue from one visit to another, at the knots of their fields."""
    side = np.linalg.norm(first.affine[:3, 0])
    return compose(second.to_visit / side, first.from_visit / side) * side


def measure_change(
    scans: Scans, rows: list[dict[str, Any]], maps: list[np.ndarray], options: Options, out: Path
) -> list[dict[str, Any]]:
    """Writes fields and maps of local change beside the visits of a subject, a picture, and figures into their rows.

    Visits whose rigid alignment is in doubt have no field. Later visits are compared with the first one that has.

    Returns:
        Percent volume change: a row per later visit and structure.
    """
    for row in rows:
        row |= {"field": "", "change_mm": float("nan"), "folding": float("nan")}
    visits = [number for number, row in enumerate(rows) if row["aligned"]]
    if len(visits) < 2:
        return []
    firsts = [scans.images[number][0] for number in visits]
    change = tissue_fields(firsts, [maps[number] for number in visits], options.spacing, options.margin)
    factors = {}
    for place, number in enumerate(visits):
        row = rows[number]
        name = row["image"].removesuffix(".b2nd")
        row["field"] = f"{name}_field.npz"
        write_field(out / row["field"], change.stored(place))
        ahead, back = change.volumes(0, place), change.volumes(place, 0)
        row["change_mm"] = float(np.linalg.norm(change.between(0, place), axis=0)[change.head].mean())
        row["folding"] = float(((ahead <= 0) | (back <= 0))[change.head].mean())
        if row["folding"] > 0:
            row["flags"].append(f"non-rigid field folds in {row['folding']:.2%} of the head")
        if place:
            _save(out / f"{name}_jacobian.nii.gz", ahead, change.grid.affine)
            factors[scans.sessions[number].name] = ahead
    subject = Path(rows[visits[0]]["image"]).parent.name
    title = f"{subject}: volumes since {scans.sessions[visits[0]].name}"
    ground = windowed([change.images[0]])[0]
    draw_change(out / "pictures" / f"{subject}.change.png", title, ground, factors, change.grid.affine)
    return _percent_changes(scans, visits, maps, change)


def _percent_changes(scans: Scans, visits: list[int], maps: list[np.ndarray], change: Change) -> list[dict[str, Any]]:
    """How much larger structures, and all tissue, are at each later visit than at the first, by the fields alone.

    One label map and one mask are enough, of whichever visit.
    """
    found: list[dict[str, Any]] = []
    for names, place, label in _regions(scans, visits, maps, change):
        sums = [np.bincount(label.ravel(), change.volumes(place, n).ravel()) for n in range(len(visits))]
        found += [
            {
                "from": scans.sessions[visits[0]].name,
                "to": scans.sessions[visits[later]].name,
                "structure": name,
                "ml": float(sums[0][value]) * change.grid.spacing**3 / 1000,
                "percent_change": 100 * float(sums[later][value] / sums[0][value] - 1),
            }
            for later in range(1, len(visits))
            for value, name in names.items()
        ]
    return found


def _regions(
    scans: Scans, visits: list[int], maps: list[np.ndarray], change: Change
) -> Iterator[tuple[dict[int, str], int, np.ndarray]]:
    """Label maps ``(D, H, W)`` on the fields' grid with the names of their values, and the visit that each is of."""
    overlays = [scans.labels, scans.masks if any(scans.masks) else scans.labels]
    labels, mask = (next(((n, o) for n in visits if (o := own[n]) and o.visit == n), None) for own in overlays)
    if labels:
        number, overlay = labels
        label = resample_label(overlay.voxels, overlay.affine, change.grid, maps[number])
        yield {int(v): str(v) for v in np.unique(label[label > 0])}, visits.index(number), label
    if mask and next(iter(scans.sessions[mask[0]].images)) in DARK_FLUID:
        number, overlay = mask
        brain = resample_mask(overlay.voxels > 0, overlay.affine, change.grid, maps[number])
        tissue = _tissue(brain, change.images[visits.index(number)])
        if tissue.any():
            yield {1: "tissue"}, visits.index(number), tissue.astype(np.int16)


def change_rows(
    name: str, record: dict[str, Any], times: dict[tuple[str, str], dict[Any, Any]]
) -> list[dict[str, Any]]:
    """Rows of the table of changes, of one subject's record.

    Args:
        name: of the subject.
        record: of it.
        times: (subject, session) → its row of the visit table, whose ``time`` is in years.
    """
    found = []
    for row in record.get("change", []):
        ends = [times.get((name, row[key])) for key in ("from", "to")]
        if ends[0] and ends[1]:
            figures = {"years": ends[1]["time"] - ends[0]["time"], **{key: row[key] for key in FIGURES}}
            rounded = {key: round(float(value), 4) for key, value in figures.items()}
            found.append({"subject": name, **{key: row[key] for key in ("from", "to", "structure")}, **rounded})
    return found


def write_changes(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the table of changes as TSV."""
    columns = ["subject", "from", "to", "structure", "years", *FIGURES]
    with atomic_write(path) as part:
        pd.DataFrame(rows, columns=columns).to_csv(part, sep="\t", index=False)


def _tissue(brain: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The brain without fluid, which is darker than half the median."""
    return brain & (image > np.median(image[brain]) / 2) if brain.any() else brain


def _save(path: Path, values: np.ndarray, affine: np.ndarray) -> None:
    """Writes a NIfTI file atomically; two runs write the same bytes."""
    image = nib.Nifti1Image(values.astype(np.float32), affine)
    image.header.set_xyzt_units("mm")
    with atomic_write(path) as part:
        part.write_bytes(gzip.compress(image.to_bytes(), 6, mtime=0))
