"""Writes a subject: its visits on the common grid, their quality figures and a picture."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lssl.data.nifti import intensity_range, scale, without_hot_voxels
from lssl.data.store import Native, write_stored
from lssl.prepare import quality
from lssl.prepare.cohort import Options
from lssl.prepare.looks import look_at
from lssl.prepare.picture import draw_subject, draw_visit, middle
from lssl.prepare.scans import Overlay, Scans, shared_image
from lssl.prepare.transforms import motion
from lssl.prepare.volumes import FrameGrid, Volume, common_grid, resample, resample_label, resample_mask

__all__ = ["LOOK", "judge", "write_visit"]

LOOK = 2.0  # mm of the grid on which figures are computed and pictures drawn
FARTHEST = 800.0  # mm that the picture before registration may span


def write_visit(
    subject: str,
    scans: Scans,
    number: int,
    maps: list[np.ndarray],
    channels: list[np.ndarray],
    grid: FrameGrid,
    options: Options,
    out: Path,
) -> dict[str, Any]:
    """Resamples every image of a visit once, scales and writes them.

    Args:
        subject: its name.
        scans: what was read of it.
        number: of the visit.
        maps: frame → every visit, mm.
        channels: first image of the visit → each of its images, mm.
        grid: where to.
        options: how.
        out: the prepared folder.

    Returns:
        The visit's row of the table.
    """
    session, images, matrix = scans.sessions[number], scans.images[number], maps[number]
    first, mask, own = images[0], scans.masks[number], scans.labels[number]
    if mask is None:
        foreground = resample_mask(first.foreground, first.affine, grid, matrix)
    else:  # perhaps of another visit, from which it comes through that visit's map
        foreground = resample_mask(mask.voxels, mask.affine, grid, maps[mask.visit])
    scaled, limits = [], []
    for volume, channel in zip(images, channels, strict=True):
        outside = 0.0 if volume.voxels.min() >= 0 else float(volume.voxels.min())
        voxels = resample(volume, grid, channel @ matrix, outside)
        limits.append(intensity_range(voxels, foreground))
        scaled.append(scale(voxels, foreground, limits[-1]))
        if volume.voxels.min() < 0 and (volume.voxels == 0).mean() > 0.25:  # normalised inside a mask
            scaled[-1][~foreground] = 0  # around the mask, interpolation left other values than the exact zero
    label = None if own is None else resample_label(own.voxels, own.affine, grid, maps[own.visit])
    name = f"{subject}_{session.name}" if session.name else subject
    path = Path("visits") / subject / f"{name}.b2nd"
    source = os.path.abspath(next(iter(session.images.values())))
    d, h, w = first.voxels.shape
    written = write_stored(
        out / path,
        np.stack(scaled),
        foreground,
        label,
        grid.affine,
        list(session.images),
        limits,
        {"subject": subject, "session": session.name},
        Native(source, (d, h, w), first.affine, matrix),
    )
    native = np.abs(first.spacing())
    return {
        "session": session.name,
        "image": path.as_posix(),
        "size_d": grid.size[0],
        "size_h": grid.size[1],
        "size_w": grid.size[2],
        "spacing": grid.spacing,
        "channels": "+".join(session.images),
        "labelled": label is not None,
        "label_from": _origin(own, number, scans),
        "lost_classes": "" if own is None or label is None else _lost(own, label),
        "bytes": written,
        "native_size": "x".join(map(str, first.voxels.shape)),
        "native_spacing": "x".join(f"{value:.3g}" for value in native),
        "foreground": "found" if mask is None else "mask",
        "mask_from": _origin(mask, number, scans),
        "raw_low": limits[0][0],
        "raw_high": limits[0][1],
        "foreground_ml": float(foreground.sum()) * grid.spacing**3 / 1000,
        "matrix": _text(matrix),
    }


def _origin(overlay: Overlay | None, number: int, scans: Scans) -> str:
    """Whether a mask or label map is the visit's own, was resampled from another grid, or came from another visit."""
    if overlay is None:
        return ""
    if overlay.visit != number:
        return scans.sessions[overlay.visit].name
    return "another grid" if overlay.resampled else "own"


def _lost(overlay: Overlay, label: np.ndarray) -> str:
    """Classes of which the new grid holds no voxel, such as ``17 (3 voxels)``."""
    values, counts = np.unique(overlay.voxels[overlay.voxels > 0], return_counts=True)
    left = set(np.unique(label).tolist())
    return ", ".join(f"{v} ({n} voxels)" for v, n in zip(values, counts, strict=True) if int(v) not in left)


def _text(matrix: np.ndarray) -> str:
    return " ".join(f"{value:.9g}" for value in matrix[:3].ravel())


def comparable(
    scans: Scans, maps: list[np.ndarray], channels: list[list[np.ndarray]]
) -> tuple[list[Volume], list[np.ndarray], list[str]]:
    """What of each visit is compared with the others: an image of one contrast, if all visits have one in common.

    Args:
        scans: what was read of a subject.
        maps: frame → every visit, mm.
        channels: per visit, its first image → each of its images, mm.

    Returns:
        An image per visit, frame → each, and their suffixes.
    """
    chosen = shared_image(*scans.sessions)
    images = [volumes[number] for volumes, number in zip(scans.images, chosen, strict=True)]
    moved = [own[number] @ matrix for own, number, matrix in zip(channels, chosen, maps, strict=True)]
    return images, moved, [list(s.images)[number] for s, number in zip(scans.sessions, chosen, strict=True)]


def judge(
    subject: str,
    images: list[Volume],
    maps: list[np.ndarray],
    contrasts: list[str],
    rows: list[dict[str, Any]],
    found: dict[str, Any],
    options: Options,
    out: Path,
) -> None:
    """Adds quality figures and flags to the rows, and draws the picture; see :func:`comparable`."""
    firsts = [replace(image, voxels=without_hot_voxels(image.voxels)) for image in images]
    after_grid = common_grid(firsts, maps, LOOK, 4.0)
    apart = [np.eye(4) for _ in firsts]
    before_grid = common_grid(firsts, apart, LOOK, 4.0)
    if max(before_grid.size) > FARTHEST / LOOK:  # scanner coordinates that have nothing to do with each other
        before_grid = common_grid(firsts[:1], apart[:1], LOOK, 4.0)
    after, masks = _looks(firsts, maps, after_grid)
    before, masks_before = _looks(firsts, apart, before_grid)
    now, then = (quality.pairwise(*looks, contrasts) for looks in ((after, masks), (before, masks_before)))
    views = [
        resample_mask(np.ones(volume.voxels.shape, bool), volume.affine, after_grid, matrix)
        for volume, matrix in zip(firsts, maps, strict=True)
    ]
    head = np.any(masks, 0)
    for number, row in enumerate(rows):
        row |= motion(maps, number, firsts[number].points()) | {
            "ncc_before": then[number]["ncc"],
            "ncc_after": now[number]["ncc"],
            "mi_before": then[number]["mi"],
            "mi_after": now[number]["mi"],
            "overlap": now[number]["overlap"],
            "common_ml": now[number]["common"] * LOOK**3 / 1000,
            "coverage": float((views[number] & head).sum() / max(1, head.sum())),
            "disagreement_mm": found["disagreement"][number],
            "closure_mm": found["closure"],
            "same_person": found["same_person"][number],
        }
        row["other_contrast"] = len(rows) > 1 and contrasts.count(contrasts[number]) == 1
        row["flags"] = quality.flags(row, firsts[number].spacing(), options.floor)
        row["aligned"] = not quality.misaligned(row, options.floor)
    names = [row["session"] or subject for row in rows]
    notes = [
        "" if np.isnan(row["ncc_after"]) else f"NCC {row['ncc_before']:.2f} → {row['ncc_after']:.2f}" for row in rows
    ]
    place = after_grid.affine @ [*middle(after[0], LOOK), 1.0]
    spacing, looks = look_at(firsts, maps, (before_grid, after_grid), place, names, notes)
    what = f"edges of later visits on {names[0]}" if len(names) > 1 else "seen once"
    draw_subject(
        out / "pictures" / f"{subject}.png", f"{subject}, {', '.join(dict.fromkeys(contrasts))}: {what}", looks, spacing
    )
    for row, look in zip(rows, looks, strict=True):
        row["picture"] = f"pictures/{Path(row['image']).stem}.jpg"
        draw_visit(out / row["picture"], look, spacing)


def _looks(volumes: list[Volume], maps: list[np.ndarray], grid: FrameGrid) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Scaled images and foregrounds on a coarse grid."""
    images, masks = [], []
    for volume, matrix in zip(volumes, maps, strict=True):
        mask = resample_mask(volume.foreground, volume.affine, grid, matrix)
        images.append(scale(resample(volume, grid, matrix), mask))
        masks.append(mask)
    return images, masks
