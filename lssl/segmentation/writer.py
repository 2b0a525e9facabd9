"""SegmentationWriter: ``lssl predict`` of a Segmenter writes NIfTI label maps, volumes, their change and pictures."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import nibabel as nib
import numpy as np
import pandas as pd
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from lssl.data.header import file_affine, open_image
from lssl.data.pairs import count, visit_name
from lssl.data.store import read_stored
from lssl.runs.folder import back_up
from lssl.runs.predictions import prediction_folder
from lssl.runs.result_folder import ResultFolder
from lssl.runs.visit_log import VisitLog
from lssl.segmentation.change import yearly_change
from lssl.segmentation.classes import Classes
from lssl.segmentation.native import to_native
from lssl.segmentation.volumes import later_visit
from lssl.utils.distributed import every_rank
from lssl.utils.files import atomic_write, digest

__all__ = ["SegmentationWriter", "entities", "write_label", "write_names", "write_visit"]

HASHED = re.compile("x[0-9a-f]{8}$")
STORED = ".b2nd"  # files of a prepared folder


class SegmentationWriter(ResultFolder):
    """Writes a BIDS derivative into a folder of the cohort, ``RUN/predict/COHORT``.

    ``sub-…/ses-…/anat/sub-…_ses-…_desc-lssl_dseg.nii.gz`` has the grid, affine and axes of the visit's own file. For a
    prepared visit, this is the original scan, reached through the stored transform. The label map holds the training
    label values (the first value of each class), which ``desc-lssl_dseg.tsv`` names. ``volumes.csv`` holds subject,
    session, age, years since the first visit, structure and mm³; ``change.csv`` the yearly change of each structure of
    each subject (:mod:`.change`); ``visits.tsv`` the visits (:class:`lssl.runs.visit_log.VisitLog`).
    ``trajectories.png`` shows the cohort, ``pictures/`` every subject. Files are written
    atomically; earlier tables of the same cohort and weights are kept under numbered names.

    Attributes:
        folder: of the cohort (:func:`lssl.runs.predictions.prediction_folder`).
        rows: of ``volumes.csv``, of this process.
    """

    def __init__(self) -> None:
        self.folder = Path()
        self.rows: list[dict[str, Any]] = []
        self.subjects: dict[str, str] = {}
        self.sessions: dict[str, str] = {}
        self._slices: dict[str, list[Any]] = {}
        self._heights: dict[str, float] = {}
        self._visits = VisitLog()

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Finds the folder; writes the names of the values."""
        self.rows, self._slices, self._heights, classes = [], {}, {}, pl_module.known_classes()
        self._visits = VisitLog()
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        table = data.table
        self.subjects, self.sessions = entities("sub", table["subject"]), entities("ses", table["session"])
        found = None
        if trainer.is_global_zero:
            run, weights = Path(trainer.default_root_dir), trainer.ckpt_path
            found = pl_module.results or prediction_folder(run, data.location, table, weights)
        self.folder = every_rank(found)[0]
        if not trainer.is_global_zero:
            return
        if changed := [f"{name!r} → {label}" for name, label in self.subjects.items() if HASHED.search(label)]:
            rank_zero_warn(f"Names that would be one in BIDS get a hash in their files: {', '.join(changed[:5])}.")
        write_names(self.folder / "desc-lssl_dseg.tsv", classes)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes one visit; Lightning keeps what predict_step returned, so the label map is taken out of it."""
        batch = later_visit(batch)
        visit = trainer.datamodule.table.iloc[int(batch.session[0, 1])]  # type: ignore[attr-defined]
        label = outputs.pop("label").cpu().numpy()
        self._visits.add(batch)
        affine = batch.affines[0, 1].cpu().numpy()
        self._keep_slice(visit, batch.picture(0, 1).cpu().numpy(), label, affine)
        folders = [self.subjects[visit["subject"]]] + [self.sessions[visit["session"]]] * bool(visit["session"])
        name = "_".join([*folders, "desc-lssl_dseg.nii.gz"])
        path = self.folder.joinpath(*folders, "anat", name)
        label, affine = write_visit(path, label, affine, visit)
        classes = pl_module.classes
        size = abs(np.linalg.det(affine[:3, :3]))
        of = {"subject": visit["subject"], "session": visit["session"], "age": visit["age"], "years": visit["time"]}
        for structure, values in zip(classes.names, classes.values, strict=True):
            mm3 = round(float((label == values[0]).sum() * size), 3)
            self.rows.append({**of, "structure": structure, "mm3": mm3})

    def _keep_slice(self, visit: pd.Series, image: np.ndarray, label: np.ndarray, affine: np.ndarray) -> None:
        """For the subject's picture."""
        from lssl.segmentation.trajectories import slice_of

        subject, age = visit["subject"], visit["age"]
        title = " ".join([str(visit["session"]), f"(age {age:.1f})" if age == age else ""]).strip()
        part, height = slice_of(title, image, label, affine, self._heights.get(subject))
        self._heights.setdefault(subject, height)
        self._slices.setdefault(subject, []).append(part)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Joins the visits of all processes, and writes tables and pictures."""
        self._visits.write(self.folder, trainer.datamodule.table)  # type: ignore[attr-defined]
        ranks = every_rank((self.rows, self._slices))
        if not trainer.is_global_zero:
            return
        volumes = pd.DataFrame([row for rows, _ in ranks for row in rows])
        slices: dict[str, list[Any]] = {}
        for _, of_rank in ranks:
            for subject, parts in of_rank.items():
                slices.setdefault(subject, []).extend(parts)
        if volumes.empty:
            return
        table = trainer.datamodule.table  # type: ignore[attr-defined]
        order = {visit: row for row, visit in enumerate(zip(table["subject"], table["session"], strict=True))}
        place = [order[visit] for visit in zip(volumes["subject"], volumes["session"], strict=True)]
        volumes = volumes.iloc[np.argsort(place, kind="stable")].drop_duplicates(["subject", "session", "structure"])
        change = yearly_change(volumes)
        for name, content in (("volumes.csv", volumes), ("change.csv", change)):
            back_up(self.folder / name)
            _write_text(self.folder / name, content.to_csv(index=False, float_format="%.8g"))
        self._draw(volumes, change, slices)
        rank_zero_info(_said(volumes, change))

    def _draw(self, volumes: pd.DataFrame, change: pd.DataFrame, slices: dict[str, list[Any]]) -> None:
        from lssl.segmentation.trajectories import draw_cohort, draw_subject

        title = f"{self.folder.name}: predicted volumes of {count(volumes['subject'].nunique(), 'subject')}"
        draw_cohort(volumes, change, self.folder / "trajectories.png", title)
        for subject, parts in slices.items():
            path = self.folder / "pictures" / f"{self.subjects[subject]}.png"
            own, rates = (table[table["subject"] == subject] for table in (volumes, change))
            draw_subject(subject, parts, own, rates, path)


def _said(volumes: pd.DataFrame, change: pd.DataFrame) -> str:
    """Whose change is known, and which visits have no time."""
    subjects = change.groupby("subject", sort=False)["ml_per_year"].count()
    parts = [f"Yearly change of {(subjects > 0).sum()} of {count(len(subjects), 'subject')}"]
    if (subjects == 0).any():
        parts.append(f"{(subjects == 0).sum()} without, as it takes two visits at different times")
    visits = volumes.drop_duplicates(["subject", "session"]).reset_index(drop=True)
    without = [visit_name(visits, int(row)) for row in np.flatnonzero(visits["years"].isna())]
    if without:
        some = ", ".join(without[:3]) + (", …" if len(without) > 3 else "")
        parts.append(f"{count(len(without), 'visit')} without a time left out ({some})")
    return "; ".join(parts) + "."


def write_names(path: Path, classes: Classes) -> None:
    """Writes the table that names the values of label maps."""
    lines = [f"{values[0]}\t{name}" for name, values in zip(classes.names, classes.values, strict=True)]
    _write_text(path, "\n".join(["index\tname", *lines]) + "\n")


def write_visit(path: Path, label: np.ndarray, affine: np.ndarray, visit: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Writes the label map of a visit on the grid of its own file, of a prepared visit on that of the original scan.

    Args:
        path: ``….nii.gz``.
        label: ``(D, H, W)`` label values on the grid that was read.
        affine: ``(4, 4)`` of it.
        visit: its row of the table.

    Returns:
        The label map and its affine as they were written, in canonical axes.
    """
    source = str(visit["image"]) if "image" in visit else ""
    if source.endswith(STORED) and (native := read_stored(source).native):
        label, affine, source = to_native(label, affine, native), native.affine, native.file
    write_label(path, label, affine, source)
    return label, affine


def write_label(path: Path, label: np.ndarray, affine: np.ndarray, source: str = "") -> None:
    """Writes a label map atomically.

    Args:
        path: ``….nii.gz``.
        label: ``(D, H, W)`` int16 in closest canonical axes.
        affine: ``(4, 4)`` of it.
        source: the segmented file (NIfTI or MGH); the result gets its grid, axes and space codes. Without one, the
            label map is written unchanged.
    """
    image = nib.Nifti1Image(label.astype(np.int16), affine)
    if source and not source.endswith(STORED) and os.path.exists(source):
        of = open_image(source)
        own = file_affine(of, source)
        turned = ornt_transform(axcodes2ornt("RAS"), io_orientation(own))
        moved = apply_orientation(label, turned).astype(np.int16)
        if moved.shape == of.shape[:3]:
            image = nib.Nifti1Image(moved, own)
            if isinstance(of, nib.Nifti1Pair):
                _take_codes(image, of)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name.removesuffix('.nii.gz')}.part.nii.gz")
    try:
        nib.save(image, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _take_codes(image: Any, of: Any) -> None:
    """Copies units and space codes of the segmented file; an invalid sform gets no code."""
    image.header.set_xyzt_units(*of.header.get_xyzt_units())
    if int(of.header["qform_code"]) > 0:
        image.set_qform(of.get_qform(), int(of.header["qform_code"]))
    else:
        image.set_qform(None, 0)
    sform = of.get_sform(coded=True)[0]
    usable = sform is not None and np.array_equal(sform, image.affine)
    image.set_sform(sform if usable else None, int(of.header["sform_code"]) if usable else 0)


def entities(key: str, names: Iterable[str]) -> dict[str, str]:
    """Name → BIDS entity, as ``sub-01`` from ``01`` or ``sub-01``; distinct names have distinct entities.

    BIDS allows letters and digits only. Names that would then be the same, perhaps on a file system that does not tell
    ``a`` from ``A``, get a hash of the whole name, and so does a name without letters and digits.
    """
    kept = {name: re.sub("[^A-Za-z0-9]", "", name.removeprefix(f"{key}-")) for name in dict.fromkeys(names)}
    count = Counter(label.casefold() for label in kept.values())
    alone = {name: bool(label) and count[label.casefold()] == 1 for name, label in kept.items()}
    return {name: f"{key}-{label}{'' if alone[name] else 'x' + digest(name)[:8]}" for name, label in kept.items()}


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as part:
        part.write_text(text)
