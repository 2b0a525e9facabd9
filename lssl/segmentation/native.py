"""Resamples label maps of prepared visits to the grid of the original scan."""

from __future__ import annotations

import numpy as np
import torch

from lssl.data.store import Native
from lssl.views import geometry as geo

__all__ = ["to_native"]


def to_native(label: np.ndarray, affine: np.ndarray, native: Native) -> np.ndarray:
    """Resamples a label map through the stored transform: each class linearly; the largest value wins.

    With A the label map's index → frame (mm), M frame → scan (mm) and N the scan's index → mm, voxel i of the scan
    takes its value at index ``A⁻¹ M⁻¹ N i``.

    Args:
        label: ``(D, H, W)`` int16 in the subject's frame.
        affine: ``(4, 4)``, its index → frame in mm.
        native: the scan.

    Returns:
        ``native.shape`` int16 along the scan's canonical axes; 0 outside the prepared grid.
    """
    matrix = torch.from_numpy(np.linalg.inv(affine) @ np.linalg.inv(native.matrix) @ native.affine)[None]
    stored = torch.from_numpy(label.astype(np.int64))
    best = torch.zeros(native.shape)
    result = torch.zeros(native.shape, dtype=torch.int16)
    for value in np.unique(label).tolist():  # background first: any class with a larger share replaces it
        share = geo.resample((stored == value).float()[None, None], matrix, native.shape)[0, 0]
        wins = share > best
        result[wins], best[wins] = value, share[wins]
    return result.numpy()
