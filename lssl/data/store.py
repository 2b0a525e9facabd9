"""One chunked, compressed file per visit, of which any box can be read alone.

A file is a blosc2 array ``(C [+ 1], D, H, W)`` of int16: the image's channels and, if there is one, the label map. A
voxel of a channel is ``2 n + f``, where ``n`` counts thousandths of the robust range (:data:`lssl.data.STEP`: 0 is
background, 1000 the 99.9th percentile of the foreground) and ``f`` is 1 in the foreground: as a bit of its own, the
foreground costs next to nothing in space, and a box of it comes with the image's. The metadata carry the affine, the
raw values of 0 and 1000 of every channel, and some places of the foreground, so that a box around one can be chosen
without reading the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from lssl.data import STEP
from lssl.utils.errors import InputError
from lssl.utils.files import atomic_write

__all__ = ["StoredVisit", "quantise", "read_stored", "write_stored"]

CHUNK, BLOCK = 64, 32
PLACES = 512
KEY = "lssl"


@dataclass
class StoredVisit:
    """An open visit; voxels are read when :meth:`box` asks for them.

    Attributes:
        array: the blosc2 array.
        affine: ``(4, 4)`` float64, index → frame in mm.
        channels: names of the image's channels, such as T1w.
        limits: raw values of 0 and 1 of every channel.
        places: ``(N, 3)`` int16, some foreground voxels drawn evenly; empty if there is none.
        bounds: first and last + 1 foreground voxel of each axis, ``(2, 3)``.
        labelled: whether the last channel is a label map.
        origin: which subject and session it is.
    """

    array: Any
    affine: np.ndarray
    channels: list[str]
    limits: list[tuple[float, float]]
    places: np.ndarray
    bounds: np.ndarray
    labelled: bool
    origin: dict[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along ``(D, H, W)``."""
        d, h, w = self.array.shape[1:]
        return d, h, w

    def box(self, start: Sequence[int], size: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """A box: image ``(C, *size)`` int16 in steps, foreground ``size`` bool, label ``size`` int16 or ``None``."""
        window = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        voxels = self.array[(slice(None), *window)]
        image = voxels[: len(self.channels)]
        foreground = np.empty(image.shape[1:], bool)
        np.bitwise_and(image[0], 1, out=foreground, casting="unsafe")
        image >>= 1  # in place: at this size, fresh memory costs as much as the arithmetic
        return image, foreground, voxels[-1] if self.labelled else None

    def raw(self) -> np.ndarray:
        """The image in its raw intensities, ``(C, D, H, W)`` float32; values cut off below the background are lost."""
        image, _, _ = self.box((0, 0, 0), self.shape)
        low, high = np.array(self.limits, np.float32).T[:, :, None, None, None]
        return low + image * np.float32(STEP) * (high - low)


def quantise(scaled: np.ndarray) -> np.ndarray:
    """Scaled values as int16 steps of 15 bits; beyond 16 times the brightest tissue they are cut off."""
    return np.rint(scaled / np.float32(STEP)).clip(-(2**14), 2**14 - 1).astype(np.int16)


def write_stored(
    path: Path,
    image: np.ndarray,
    foreground: np.ndarray,
    label: np.ndarray | None,
    affine: np.ndarray,
    channels: Sequence[str],
    limits: Sequence[tuple[float, float]],
    origin: dict[str, str],
) -> int:
    """Writes a visit, whole or not at all.

    Args:
        path: the ``.b2nd`` file.
        image: ``(C, D, H, W)`` float32, scaled.
        foreground: ``(D, H, W)`` bool.
        label: ``(D, H, W)`` int16.
        affine: index → frame in mm.
        channels: name of each channel.
        limits: raw values of 0 and 1 of each channel.
        origin: subject and session.

    Returns:
        Bytes written.
    """
    coded = 2 * quantise(image) + foreground.astype(np.int16)
    stack = coded if label is None else np.concatenate([coded, label[None]])
    chunks = (1, *(min(CHUNK, length) for length in foreground.shape))
    blocks = (1, *(min(BLOCK, length) for length in foreground.shape))
    places, bounds = _outline(foreground)
    meta = {
        "version": 1,
        "affine": affine.ravel().tolist(),
        "channels": list(channels),
        "limits": [[float(low), float(high)] for low, high in limits],
        "step": STEP,
        "labelled": label is not None,
        "places": places.tobytes(),
        "bounds": bounds.tolist(),
        "origin": origin,
    }
    with atomic_write(path) as part:
        array = blosc2.asarray(
            stack,
            chunks=chunks,
            blocks=blocks,
            urlpath=str(part),
            mode="w",
            contiguous=True,
            cparams={"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1},
        )
        array.schunk.vlmeta[KEY] = meta
        del array
        return part.stat().st_size


def _outline(foreground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Some voxels of the foreground, ``(N, 3)`` int16, and its first and last + 1 voxel of each axis, ``(2, 3)``."""
    index = np.argwhere(foreground)
    drawn = np.random.default_rng(0).permutation(len(index))[:PLACES]
    bounds = np.stack([index.min(0), index.max(0) + 1]) if len(index) else np.array([[0, 0, 0], foreground.shape])
    return index[drawn].astype(np.int16), bounds


def read_stored(path: str | Path, frame: bytes | None = None) -> StoredVisit:
    """Opens a visit without reading its voxels, which costs about a tenth of a millisecond.

    Args:
        path: the file.
        frame: its bytes, where they are in memory already.
    """
    try:
        if frame is None:
            array = blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
        else:
            array = blosc2.ndarray_from_cframe(frame, copy=False)
        meta = array.schunk.vlmeta[KEY]
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; run `lssl prepare` again to restore it.") from error
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} is no prepared visit or is damaged; run `lssl prepare` again to restore it."
        ) from error
    return StoredVisit(
        array=array,
        affine=np.array(meta["affine"], float).reshape(4, 4),
        channels=meta["channels"],
        limits=[(low, high) for low, high in meta["limits"]],
        places=np.frombuffer(meta["places"], np.int16).reshape(-1, 3),
        bounds=np.array(meta["bounds"]),
        labelled=meta["labelled"],
        origin=meta["origin"],
    )
