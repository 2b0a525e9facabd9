"""What is shown of a subject's visits: slices at their finest resolution, and what differs between them."""

from __future__ import annotations

import numpy as np

from lssl.data.nifti import intensity_range, scale
from lssl.prepare.picture import Look
from lssl.prepare.quality import FEWEST, ncc
from lssl.prepare.volumes import FrameGrid, Volume, slices

__all__ = ["difference", "look_at", "windowed"]

FINEST = 0.5  # mm of a pixel
TISSUE = 0.05  # share of the window above which a pixel is tissue
WINDOW = 0.8, 1.25  # quantile of a head that is bright tissue, not fat, and what is shown beyond it
#: Correlation of the slices after matching: .92 of a T1w pair and .88 to .98 of three FLAIR pairs, two of them of two
#: protocols, that were at hand; .04 to .50 of six pairs of T1w, T2w and FLAIR.
SAME_CONTRAST = 0.75


def look_at(
    volumes: list[Volume],
    maps: list[np.ndarray],
    grids: tuple[FrameGrid, FrameGrid],
    place: np.ndarray,
    names: list[str],
    notes: list[str],
) -> tuple[float, list[Look]]:
    """How the visits of a subject are shown.

    Args:
        volumes: the visits.
        maps: half-way frame → each visit, mm.
        grids: whose extents are shown, in scanner coordinates and in the half-way frame.
        place: ``(4,)`` mm in the half-way frame, through which all slices go; before registration, through where the
            first visit has it.
        names: of the visits.
        notes: of each visit.

    Returns:
        mm of a pixel, and the looks.
    """
    spacing = max(FINEST, min(float(volume.spacing().min()) for volume in volumes))
    looks: list[Look] = []
    for volume, matrix, name, note in zip(volumes, maps, names, notes, strict=True):
        both = ((matrix, place, grids[1]), (np.eye(4), maps[0] @ place, grids[0]))
        after, before = (_bright(volume, slices(volume, to, at[:3], grid, spacing)) for to, at, grid in both)
        looks.append(Look(name, after, before, difference(after, looks[0].after) if looks else [], note))
    return spacing, looks


def _bright(volume: Volume, images: list[np.ndarray]) -> list[np.ndarray]:
    limits = intensity_range(volume.voxels, volume.foreground)
    return windowed([scale(image, image != 0, limits) for image in images])


def windowed(images: list[np.ndarray]) -> list[np.ndarray]:
    """Slices of a scaled visit, brighter: tissue is nearly 1; fat, which outshines it, may be more."""
    head = np.concatenate([image[image > TISSUE] for image in images])
    window = float(np.quantile(head, WINDOW[0])) * WINDOW[1] if len(head) else 1.0
    return [image / window for image in images]


def difference(images: list[np.ndarray], first: list[np.ndarray]) -> list[np.ndarray]:
    """Slices of a visit minus those of the first visit, after their histograms are matched; 0 outside both heads.

    Args:
        images: of the visit.
        first: of the first visit.

    Returns:
        Nothing if the heads share too few pixels, or their intensities do not match: then contrasts differ.
    """
    own, theirs = (np.concatenate([image.ravel() for image in part]) for part in (images, first))
    inside = (own > TISSUE) & (theirs > TISSUE)
    if inside.sum() < FEWEST:
        return []
    share = np.linspace(0, 1, 101)
    known, wanted = np.quantile(own[inside], share), np.quantile(theirs[inside], share)
    if ncc(np.interp(own, known, wanted), theirs, inside) < SAME_CONTRAST:
        return []
    return [
        np.where((image > TISSUE) & (other > TISSUE), np.interp(image, known, wanted) - other, 0)
        for image, other in zip(images, first, strict=True)
    ]
