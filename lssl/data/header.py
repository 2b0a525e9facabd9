"""Headers of image files: affines in mm, and refusal of files without a valid one.

Supported formats: NIfTI-1 and NIfTI-2 (single files and pairs) and FreeSurfer's MGH, with or without compression.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from lssl.utils.errors import InputError

__all__ = [
    "affine_mm",
    "damaged",
    "file_affine",
    "is_gzip",
    "knows_orientation",
    "memory_needed",
    "open_image",
    "valid_affine",
]

UNITS = {"meter": 1000.0, "mm": 1.0, "micron": 1e-3, "unknown": 1.0}  # NIfTI-1, xyzt_units
SMALLEST, LARGEST = 1.0, 5000.0  # mm of the longest side of a scan, from a mouse's cortex to a whole body
LFS = b"version https://git-lfs"


def open_image(path: str) -> Any:
    """Opens an image file without reading its voxels.

    Raises:
        InputError: if the file is missing, damaged, in Analyze format, or a pointer without content (git-annex, Git
            LFS).
    """
    if not os.path.exists(path):
        if os.path.islink(path):
            raise InputError(
                f"{path} is a link to content that is not here; fetch it (`datalad get` or `git annex get`) or leave "
                f"the visit out."
            )
        raise InputError(f"{path} does not exist; correct its path or remove its visit.")
    try:
        image: Any = nib.load(path)
    except Exception as error:  # nibabel raises anything, even KeyError, on a damaged header
        raise InputError(damaged(path, error)) from error
    if isinstance(image, nib.AnalyzeImage) and not isinstance(image, nib.Nifti1Pair):
        raise InputError(
            f"{path} is Analyze 7.5, a format that does not tell left from right; convert the scan to NIfTI again."
        )
    return image


def damaged(path: str, error: Exception) -> str:
    """The message for a file that cannot be read."""
    try:
        with open(path, "rb") as file:
            if file.read(len(LFS)) == LFS:
                return f"{path} is a Git LFS pointer without content; fetch it (`git lfs pull`) or leave the visit out."
    except OSError:
        pass
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{path} cannot be read and seems damaged or cut off ({reason}); restore the file or leave the visit out."


def knows_orientation(image: Any) -> bool:
    """Whether a header tells left from right: a NIfTI's sform or qform code, an MGH's flag."""
    header = image.header
    if hasattr(header, "get_sform"):
        return int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0
    return not isinstance(image, nib.MGHImage) or int(header["goodRASFlag"]) > 0


def valid_affine(affine: np.ndarray | None) -> bool:
    """Whether an affine is finite and turns three axes into three directions."""
    if affine is None or not np.isfinite(affine).all():
        return False
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(steps.min() > 0 and abs(np.linalg.det(affine[:3, :3] / steps)) > 1e-6)


def file_affine(image: Any, path: str) -> np.ndarray:
    """``(4, 4)`` float64, index → position in the file's own unit; the qform if the sform is coded but invalid."""
    affine = image.affine
    if not valid_affine(affine) and hasattr(image.header, "get_qform") and int(image.header["qform_code"]) > 0:
        try:
            affine = image.header.get_qform()
        except ValueError:  # a quaternion longer than 1
            affine = None
    if not valid_affine(affine):
        raise InputError(f"{path} has no valid affine, so its voxels have no place in space; repair its header.")
    return np.asarray(affine, np.float64)


def affine_mm(image: Any, path: str, strict: bool = True) -> np.ndarray:
    """``(4, 4)`` float64, index → mm; the header's unit may be metre, mm or micron.

    Args:
        image: the open file.
        path: its name, for messages.
        strict: refuses a header without an orientation.

    Raises:
        InputError: if the orientation is unknown, or if the scan would be smaller than 1 mm or larger than 5 m.
    """
    if strict and not knows_orientation(image):
        raise InputError(
            f"{path} says nothing of its orientation (sform and qform codes are 0), so left and right cannot be told "
            f"apart; restore the header, for example by converting the scan again."
        )
    affine = file_affine(image, path).copy()
    try:
        unit = image.header.get_xyzt_units()[0] if isinstance(image, nib.Nifti1Pair) else "mm"
    except KeyError as error:
        raise InputError(f"{path} has lengths in the unit {error} (xyzt_units), which NIfTI does not know.") from None
    affine[:3] *= UNITS.get(unit, 1.0)
    longest = float((np.linalg.norm(affine[:3, :3], axis=0) * image.shape[:3]).max())
    if not SMALLEST <= longest <= LARGEST:
        said = "of an unknown unit" if unit == "unknown" else f"in {unit}"
        raise InputError(
            f"{path} would be {longest:.3g} mm long by its header, whose lengths are {said}; correct the voxel size "
            f"(pixdim, sform) or the unit (xyzt_units)."
        )
    return affine


def memory_needed(image: Any) -> int:
    """Bytes needed to read the voxels as float32: the stored voxels and the result."""
    stored = int(np.dtype(image.get_data_dtype()).itemsize)
    return int(np.prod([int(length) for length in image.shape], dtype=np.float64)) * (stored + 4)


def is_gzip(path: str) -> bool:
    """Whether a file starts like one compressed by gzip."""
    with Path(path).open("rb") as file:
        return file.read(2) == b"\x1f\x8b"
