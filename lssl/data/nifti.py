"""Reading images as visits: canonical axes, checked values, foreground and robust scaling.

Header functions never read voxels, so the grids of a whole cohort can be checked before training starts. Compressed
files are read to their end, where gzip stores a checksum, so a flipped bit raises an error.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from lssl.data.header import affine_mm, damaged, is_gzip, memory_needed, open_image
from lssl.utils.errors import InputError
from lssl.utils.memory import refuse_larger_than_memory

__all__ = [
    "Grid",
    "automatic_foreground",
    "checked_image",
    "checked_label",
    "checked_mask",
    "intensity_range",
    "read_grid",
    "read_grids",
    "read_image",
    "read_label",
    "read_mask",
    "scale",
    "without_hot_voxels",
]

GRID_TOLERANCE = 0.01  # voxels: rounding of affines stays below, a moved scan is far above
LABEL_TOLERANCE = 1e-3  # rounding of whole numbers by scaled storage


class Grid(NamedTuple):
    """Shape and affine of a file, after reorientation to the closest canonical axes.

    Attributes:
        shape: ``(3,)`` voxels per axis.
        affine: ``(4, 4)`` float64, index → mm.
    """

    shape: np.ndarray
    affine: np.ndarray

    def same(self, other: Grid) -> bool:
        """Whether all voxels of both grids coincide, to within a hundredth of the smaller voxel side."""
        if not np.array_equal(self.shape, other.shape):
            return False
        side = min(float(np.linalg.norm(grid.affine[:3, :3], axis=0).min()) for grid in (self, other))
        return self.distance(other) <= GRID_TOLERANCE * side

    def distance(self, other: Grid) -> float:
        """Largest distance in mm between voxels with the same index; the maximum is at a corner."""
        index = np.stack(np.meshgrid(*[(0.0, float(length - 1)) for length in self.shape], indexing="ij"), -1)
        difference = self.affine - other.affine
        apart = index.reshape(-1, 3) @ difference[:3, :3].T + difference[:3, 3]
        return float(np.linalg.norm(apart, axis=1).max())


def read_grid(path: str, strict: bool = True) -> Grid:
    """The grid of a file from its header alone.

    Args:
        path: the file.
        strict: refuses a header without an orientation.
    """
    return _grid(open_image(path), path, strict)


def _grid(image: Any, path: str, strict: bool = True) -> Grid:
    shape = image.shape
    if len(shape) < 3 or any(length != 1 for length in shape[3:]) or min(shape) < 1:
        raise InputError(
            f"{path} has the shape {'×'.join(map(str, shape))}, but a visit is one 3D volume; split it or choose one."
        )
    affine = affine_mm(image, path, strict)
    orientation = io_orientation(affine)
    canonical = np.empty(3, dtype=np.int64)
    canonical[orientation[:, 0].astype(int)] = shape[:3]
    return Grid(canonical, affine @ inv_ornt_aff(orientation, shape[:3]))


def read_grids(paths: Sequence[str]) -> list[Grid]:
    """Grids of many files; threads hide the waiting for network storage."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(read_grid, paths))


def read_image(path: str) -> tuple[np.ndarray, np.ndarray]:
    """``(D, H, W)`` float32 voxels in canonical axes, and the affine; refuses NaN and constant images."""
    voxels, affine = _read(path)
    return checked_image(voxels, path), affine


def read_mask(path: str) -> np.ndarray:
    """``(D, H, W)`` bool, voxels above 0.5; refuses an empty mask."""
    return checked_mask(_read(path)[0], path)


def read_label(path: str) -> np.ndarray:
    """``(D, H, W)`` int16; values within 0.001 of a whole number are rounded, others are refused."""
    return checked_label(_read(path)[0], path)


def checked_image(voxels: np.ndarray, path: str) -> np.ndarray:
    """The voxels; refuses NaN and constant images. ``path`` is their name in messages."""
    if not np.isfinite(voxels).all():
        number = int((~np.isfinite(voxels)).sum())
        raise InputError(
            f"{path} holds {number} voxels that are NaN or infinite; replace them (0 for background) or leave it out."
        )
    if voxels.min() == voxels.max():
        raise InputError(f"{path} is constant: every voxel is {voxels.flat[0]:g}; restore the file or leave it out.")
    return voxels


def checked_mask(voxels: np.ndarray, path: str) -> np.ndarray:
    """Bool, voxels above 0.5; refuses an empty mask."""
    mask = voxels > 0.5
    if not mask.any():
        raise InputError(f"The mask {path} is empty; restore it, or remove it to have the foreground found.")
    return mask


def checked_label(voxels: np.ndarray, path: str) -> np.ndarray:
    """int16; values within 0.001 of a whole number are rounded, others are refused."""
    label = np.nan_to_num(voxels, nan=0.5, posinf=0.5, neginf=0.5).round()
    with np.errstate(invalid="ignore"):
        broken = ~(np.abs(label - voxels) <= LABEL_TOLERANCE)
    if broken.any():
        raise InputError(
            f"The label map {path} holds {voxels[broken][0]:.6g} and {int(broken.sum()) - 1} other values that are not "
            f"whole numbers; a label map must be resampled with nearest neighbours and hold classes, not probabilities."
        )
    if label.min() < 0:
        raise InputError(
            f"The label map {path} holds the negative value {label.min():g}; give its classes numbers from 1 on, and "
            f"0 to the background."
        )
    if label.max() > np.iinfo(np.int16).max:
        raise InputError(
            f"The label map {path} holds the class {label.max():.0f}; classes are kept as 16 bits, up to "
            f"{np.iinfo(np.int16).max}: give it a smaller number."
        )
    return label.astype(np.int16)


def intensity_range(voxels: np.ndarray, foreground: np.ndarray) -> tuple[float, float]:
    """The values that :func:`scale` maps to 0 and 1: the background's, and the foreground's 99.9th percentile.

    An image without negative values keeps its zero, the natural one of MR magnitude. With negative values (z-scored or
    offset images), the lower value is the 0.1st percentile of the foreground.

    Args:
        voxels: ``(D, H, W)`` float32.
        foreground: ``(D, H, W)`` bool.
    """
    inside = voxels[foreground] if foreground.any() else voxels
    low, high = np.percentile(inside, (0.1, 99.9)) if voxels.min() < 0 else (0.0, np.percentile(inside, 99.9))
    if high <= low:
        low, high = voxels.min(), voxels.max()
    return float(low), float(high)


def scale(voxels: np.ndarray, foreground: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Maps the background to 0 and the 99.9th percentile of the foreground to 1.

    Values are clipped below 0, but not above 1: outside a brain mask, skull and fat may be brighter than the brain. In
    images with negative values, zeros outside the foreground are background.

    Args:
        voxels: ``(D, H, W)`` float32.
        foreground: ``(D, H, W)`` bool.
        limits: raw values of 0 and 1; ``None`` takes :func:`intensity_range`.
    """
    low, high = limits or intensity_range(voxels, foreground)
    scaled = np.clip((voxels - np.float32(low)) / np.float32(high - low), 0, None)
    if voxels.min() < 0:
        scaled[(voxels == 0) & ~foreground] = 0
    return scaled


def automatic_foreground(voxels: np.ndarray) -> np.ndarray:
    """The head, or the brain of a skull-stripped image: half of Otsu's threshold, cleaned and filled.

    It works at half resolution, which averages noise away. After the threshold, specks are removed. Voxels between
    foreground along all three axes (dark fluid, bone, air in the sinuses) are then filled.

    Args:
        voxels: ``(D, H, W)`` float32, finite.

    Returns:
        ``(D, H, W)`` bool.
    """
    # A signed image with many exact zeros was normalised inside a mask, so its zeros are the background.
    signal = voxels - min(voxels.min(), 0)
    if voxels.min() < 0 and (voxels == 0).mean() > 0.25:
        signal = (voxels != 0).astype(np.float32)
    coarse = without_hot_voxels(_halved(signal))
    mask = coarse > _otsu(coarse) / 2
    dense = mask & (_neighbours(mask) > 0.3 * 27)
    mask = dense if dense.any() else mask
    for _ in range(2):
        mask |= _between(mask, 0) & _between(mask, 1) & _between(mask, 2)
    fine = mask.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    return np.ascontiguousarray(fine[tuple(slice(length) for length in voxels.shape)])


def without_hot_voxels(signal: np.ndarray) -> np.ndarray:
    """Clips at three times the 99th percentile of what is above 0.

    A few voxels of a thousand times the brightness of tissue (artefacts, a wrong scale of one slice) would otherwise
    be all that a histogram with evenly spaced bins can tell apart.
    """
    above = signal[signal > 0]
    return np.minimum(signal, 3 * np.percentile(above, 99)).astype(signal.dtype) if len(above) else signal


def _halved(volume: np.ndarray) -> np.ndarray:
    """Means of 2×2×2 voxels; with an odd number of planes, the last one is repeated."""
    for axis in range(3):
        volume = np.pad(volume, [(0, volume.shape[axis] % 2 if axis == a else 0) for a in range(3)], mode="edge")
        shape = [*volume.shape[:axis], volume.shape[axis] // 2, 2, *volume.shape[axis + 1 :]]
        volume = volume.reshape(shape).mean(axis + 1)
    return volume


def _neighbours(mask: np.ndarray) -> np.ndarray:
    """Number of set voxels in the 3×3×3 neighbourhood of each voxel."""
    counts = mask.astype(np.uint8)
    for axis in range(3):
        padded = np.pad(counts, [(1, 1) if axis == a else (0, 0) for a in range(3)])
        length = counts.shape[axis]
        counts = sum(padded.take(range(shift, shift + length), axis) for shift in range(3))  # type: ignore[assignment]
    return counts


def _between(mask: np.ndarray, axis: int) -> np.ndarray:
    """Voxels with foreground on both sides along one axis."""
    before = np.logical_or.accumulate(mask, axis)
    after = np.flip(np.logical_or.accumulate(np.flip(mask, axis), axis), axis)
    return before & after


def _otsu(values: np.ndarray) -> float:
    """Otsu's threshold: it minimises the variance within both classes."""
    flat = values.ravel()
    top = float(np.quantile(flat[:: max(1, flat.size // 100_000)], 0.999)) or float(flat.max())
    histogram = np.histogram(flat.clip(0, top), 256, (0, top))[0].astype(float)
    middle = (np.arange(256) + 0.5) * top / 256
    below = histogram.cumsum()
    above = histogram.sum() - below
    mass = (histogram * middle).cumsum()
    contrast = (mass / below.clip(1) - (mass[-1] - mass) / above.clip(1)) ** 2 * below * above
    return float(middle[contrast.argmax()])


def _read(path: str) -> tuple[np.ndarray, np.ndarray]:
    """``(D, H, W)`` float32 voxels and affine (mm) in closest canonical axes."""
    image = open_image(path)
    grid = _grid(image, path)
    refuse_larger_than_memory(memory_needed(image), f"Reading {path}", "leave it out, or repair its header")
    try:
        voxels = _voxels(image, path)
    except Exception as error:  # nibabel and gzip raise anything on damaged content
        raise InputError(damaged(path, error)) from error
    turned = apply_orientation(voxels.reshape(voxels.shape[:3]), io_orientation(affine_mm(image, path)))
    return np.ascontiguousarray(turned), grid.affine


def _voxels(image: Any, path: str) -> np.ndarray:
    """Stored voxels as float32. Compressed files are read to their end, where gzip verifies its checksum."""
    if is_gzip(path) and hasattr(type(image), "from_stream"):
        with gzip.open(path) as stream:
            voxels = np.asarray(type(image).from_stream(stream).dataobj, dtype=np.float32)
            _to_the_end(stream)
        return voxels
    for part in image.file_map.values():  # a pair of header and voxels
        if part.filename and is_gzip(part.filename):
            with gzip.open(part.filename) as stream:
                _to_the_end(stream)
    return np.asarray(image.dataobj, dtype=np.float32)


def _to_the_end(stream: gzip.GzipFile) -> None:
    while stream.read(1 << 20):
        pass
