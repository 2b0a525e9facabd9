"""What is read of a subject: the images of every visit, and the masks and label maps in whose space they lie.

A visit that cannot be read is left out by name, and so is a mask or a label map; the rest of the subject goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import SimpleITK as sitk

from lssl.data.nifti import Grid, automatic_foreground, read_grid, read_image, read_label, read_mask
from lssl.prepare.cohort import CohortSubject, Options, Session
from lssl.prepare.volumes import Volume, to_itk
from lssl.utils.errors import InputError

__all__ = ["Overlay", "Scans", "read_scans", "shared_image"]

OUTSIDE = 0.1  # share of a mask or label map beyond the image, above which it is taken to belong elsewhere
Kind = Literal["mask", "label"]


@dataclass
class Overlay:
    """A mask or label map.

    Attributes:
        voxels: ``(D, H, W)`` bool or int16, on its own grid.
        affine: ``(4, 4)``, its index → mm.
        visit: number of the visit in whose space it lies.
        resampled: whether that grid is another one than the image's.
    """

    voxels: np.ndarray
    affine: np.ndarray
    visit: int
    resampled: bool


@dataclass
class Scans:
    """A subject as read.

    Attributes:
        sessions: the visits that could be read.
        images: of each visit, the images that it has with their foregrounds, in the order of the suffixes.
        masks: of each visit, its mask if it has one.
        labels: of each visit, its label map if it has one.
        left: session → why the visit was left out.
        overlays_left: file → why that mask or label map was left.
    """

    sessions: list[Session] = field(default_factory=list)
    images: list[list[Volume]] = field(default_factory=list)
    masks: list[Overlay | None] = field(default_factory=list)
    labels: list[Overlay | None] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    overlays_left: dict[str, str] = field(default_factory=dict)


def read_scans(subject: CohortSubject, options: Options) -> Scans:
    """Reads a subject.

    Raises:
        InputError: if none of its visits can be read.
    """
    scans, grids = Scans(), []
    for session in subject.sessions:
        try:
            read = [read_image(path) for path in session.images.values()]
            grids.append(read_grid(next(iter(session.images.values()))))
        except InputError as error:
            scans.left[session.name] = str(error)
            continue
        scans.sessions.append(session)
        scans.images.append([Volume(voxels, affine, np.zeros(0, bool)) for voxels, affine in read])
    if not scans.sessions:
        raise InputError(next(iter(scans.left.values())))
    scans.masks = _overlays("mask", scans, grids)
    scans.labels = _overlays("label", scans, grids)
    for number, (images, mask) in enumerate(zip(scans.images, scans.masks, strict=True)):
        for volume in images:
            volume.foreground = automatic_foreground(volume.voxels)
        if mask is not None and mask.visit == number:
            images[0].foreground, images[0].brain = _on_image(mask, images[0]), True
        if options.n4:
            for volume in images:
                volume.voxels = _without_bias(volume)
    return scans


def shared_image(*sessions: Session) -> list[int]:
    """Which image of each visit to compare: that of the first suffix that all have; without one, the first of each."""
    common = next((name for name in sessions[0].images if all(name in other.images for other in sessions)), None)
    return [list(session.images).index(common) if common else 0 for session in sessions]


def _overlays(kind: Kind, scans: Scans, grids: list[Grid]) -> list[Overlay | None]:
    """The mask or label map of each visit; one that several visits name lies in the space of one of them."""
    paths = [session.mask if kind == "mask" else session.label for session in scans.sessions]
    found: dict[str, Overlay | None] = {"": None}
    for path in dict.fromkeys(paths):
        if not path:
            continue
        users = [number for number, other in enumerate(paths) if other == path]
        try:
            found[path] = _overlay(kind, path, users, scans, grids)
        except InputError as error:
            found[path], scans.overlays_left[path] = None, str(error)
    return [found[path] for path in paths]


def _overlay(kind: Kind, path: str, users: list[int], scans: Scans, grids: list[Grid]) -> Overlay:
    grid = read_grid(path)
    on_grid = [number for number in users if grid.same(grids[number])]
    if len(users) > 1 and len(on_grid) != 1:
        where = f"on the grids of {len(on_grid)}" if on_grid else "on the grid of none"
        raise InputError(
            f"The {kind} {path} names no session, and lies {where} of the {len(users)} visits, so it is not known "
            f"whose it is; put the name of its session into its own."
        )
    visit = on_grid[0] if on_grid else users[0]
    voxels = read_mask(path) if kind == "mask" else read_label(path)
    overlay = Overlay(voxels, grid.affine, visit, not on_grid)
    beyond = _share_outside(overlay, grids[visit]) if overlay.resampled else 0.0
    if beyond > OUTSIDE:
        image = next(iter(scans.sessions[visit].images.values()))
        raise InputError(
            f"The {kind} {path} lies on another grid than {image}, and {beyond:.0%} of it beyond that image; resample "
            f"it to the image."
        )
    return overlay


def _share_outside(overlay: Overlay, grid: Grid) -> float:
    """Of its voxels above 0, the share whose places lie outside a grid."""
    index = np.argwhere(overlay.voxels > 0)
    to_grid = np.linalg.inv(grid.affine) @ overlay.affine
    places = index @ to_grid[:3, :3].T + to_grid[:3, 3]
    inside = ((places > -1) & (places < grid.shape)).all(1)
    return 1 - float(inside.mean()) if len(index) else 0.0


def _on_image(mask: Overlay, image: Volume) -> np.ndarray:
    """The mask on the image's own grid, ``(D, H, W)`` bool."""
    if not mask.resampled:
        return mask.voxels
    moved = sitk.Resample(
        to_itk(mask.voxels.astype(np.float32), mask.affine),
        to_itk(image.voxels, image.affine),
        sitk.Transform(),
        sitk.sitkLinear,
        0.0,
    )
    return sitk.GetArrayFromImage(moved).T > 0.5


def _without_bias(volume: Volume) -> np.ndarray:
    """The image divided by N4's bias field, which is estimated at about 4 mm."""
    image, mask = (
        to_itk(volume.voxels - volume.voxels.min() + 1, volume.affine),
        to_itk(volume.foreground, volume.affine),
    )
    factors = [max(1, round(4 / spacing)) for spacing in image.GetSpacing()]
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations([30, 30, 30])
    small_mask = sitk.Cast(sitk.BinShrink(sitk.Cast(mask, sitk.sitkFloat32), factors) > 0.5, sitk.sitkUInt8)
    n4.Execute(sitk.BinShrink(image, factors), small_mask)
    field_ = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(image)).T
    return (volume.voxels / np.exp(field_)).astype(np.float32)
