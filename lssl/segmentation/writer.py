"""SegmentationWriter: ``lssl predict`` of a Segmenter writes NIfTI label maps and a table of volumes."""

from __future__ import annotations

import json
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

import lssl
from lssl.data.header import file_affine, open_image
from lssl.data.store import read_stored
from lssl.runs.folder import back_up
from lssl.segmentation.native import to_native
from lssl.utils.files import atomic_write, digest

__all__ = ["SegmentationWriter", "entities", "write_label"]

FOLDER = "segmentations"
HASHED = re.compile("x[0-9a-f]{8}$")
STORED = ".b2nd"  # files of a prepared folder


class SegmentationWriter(L.Callback):
    """Writes a BIDS derivative below the run folder, ``segmentations/``.

    ``sub-…/ses-…/anat/sub-…_ses-…_desc-lssl_dseg.nii.gz`` has the grid, affine and axes of the visit's own file. For a
    prepared visit, this is the original scan, reached through the stored transform. The label map holds the training
    label values (the first value of each class), which ``desc-lssl_dseg.tsv`` names. ``volumes.csv`` holds subject,
    session, age, structure and mm³. Files are written atomically; an earlier ``volumes.csv`` is kept under a numbered
    name.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.subjects: dict[str, str] = {}
        self.sessions: dict[str, str] = {}

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Writes the description of the folder and the names of the values."""
        self.rows, classes = [], pl_module.known_classes()
        table = trainer.datamodule.table  # type: ignore[attr-defined]
        self.subjects, self.sessions = entities("sub", table["subject"]), entities("ses", table["session"])
        folder = _folder(trainer)
        if not trainer.is_global_zero:
            return
        if changed := [f"{name!r} → {label}" for name, label in self.subjects.items() if HASHED.search(label)]:
            rank_zero_warn(f"Names that would be one in BIDS get a hash in their files: {', '.join(changed[:5])}.")
        folder.mkdir(parents=True, exist_ok=True)
        about = {"Name": "lssl segmentations", "BIDSVersion": "1.9.0", "DatasetType": "derivative"}
        made = {**about, "GeneratedBy": [{"Name": "lssl", "Version": lssl.__version__}]}
        _write_text(folder / "dataset_description.json", json.dumps(made, indent=1) + "\n")
        lines = [f"{values[0]}\t{name}" for name, values in zip(classes.names, classes.values, strict=True)]
        _write_text(folder / "desc-lssl_dseg.tsv", "\n".join(["index\tname", *lines]) + "\n")

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
        visit = trainer.datamodule.table.iloc[int(batch.session[0, 0])]  # type: ignore[attr-defined]
        label = outputs.pop("label").cpu().numpy()
        affine = batch.affines[0, 0].cpu().numpy()
        folders = [self.subjects[visit["subject"]]] + [self.sessions[visit["session"]]] * bool(visit["session"])
        name = "_".join([*folders, "desc-lssl_dseg.nii.gz"])
        path = _folder(trainer).joinpath(*folders, "anat", name)
        source = str(visit["image"]) if "image" in visit else ""
        if source.endswith(STORED) and (native := read_stored(source).native):
            label, affine, source = to_native(label, affine, native), native.affine, native.file
        write_label(path, label, affine, source)
        classes = pl_module.classes
        size = abs(np.linalg.det(affine[:3, :3]))
        for structure, values in zip(classes.names, classes.values, strict=True):
            mm3 = round(float((label == values[0]).sum() * size), 3)
            of = {"subject": visit["subject"], "session": visit["session"], "age": visit["age"]}
            self.rows.append({**of, "structure": structure, "mm3": mm3})

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the volumes; each of several processes writes those of its visits, ``volumes.1.csv`` and so on."""
        rank = trainer.global_rank
        path = _folder(trainer) / ("volumes.csv" if rank == 0 else f"volumes.{rank}.csv")
        back_up(path)
        _write_text(path, pd.DataFrame(self.rows).to_csv(index=False))
        rank_zero_info(f"Segmentations and volumes: {_folder(trainer)}")


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


def _folder(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / FOLDER
