"""One chunked, compressed file per visit; any box of it can be read alone.

A file is a blosc2 array ``(C [+ 1], D, H, W)`` of int16: the image's channels and, if there is one, the label map. A
voxel of a channel is ``2 n + f``, where ``n`` counts thousandths of the robust range (:data:`lssl.data.STEP`: 0 is
background, 1000 the 99.9th percentile of the foreground) and ``f`` is 1 in the foreground. As one bit, the foreground
needs almost no space and is read together with the image. The metadata hold the affine, the raw values of 0 and 1000 of
every channel, and some foreground voxels, so that a box around one can be chosen without reading the image. They also
describe the scan that the visit was made from, so that predictions can be resampled to it.

Blosc2 stores no checksums, so the metadata hold a CRC-32 of every compressed chunk, of themselves and of the layout. A
process verifies each chunk before its first use, so a flipped bit raises an error.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from lssl.data import STEP
from lssl.utils.errors import InputError
from lssl.utils.files import atomic_write

__all__ = ["Native", "StoredVisit", "quantise", "read_stored", "write_stored"]

CHUNK, BLOCK = 64, 32
PLACES = 512
KEY = "lssl"
VERSION = 2
LARGEST = 1e3  # mm of a voxel
_verified: dict[tuple[str, int, int], int] = {}  # file, its time of change, CRC of metadata → a bit per verified chunk


@dataclass(frozen=True)
class Native:
    """The scan that a visit was made from.

    Attributes:
        file: its path.
        shape: voxels along its canonical axes.
        affine: ``(4, 4)``, index along canonical axes → mm.
        matrix: ``(4, 4)``, frame → the scan's own space, mm.
    """

    file: str
    shape: tuple[int, int, int]
    affine: np.ndarray
    matrix: np.ndarray

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "file": self.file,
            "shape": [int(length) for length in self.shape],
            "affine": self.affine.tolist(),
            "matrix": self.matrix.tolist(),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Native:
        """The inverse of :meth:`as_json`."""
        d, h, w = content["shape"]
        return cls(content["file"], (d, h, w), np.array(content["affine"]), np.array(content["matrix"]))


@dataclass
class StoredVisit:
    """An open visit; voxels are read when :meth:`box` asks for them.

    Attributes:
        array: the blosc2 array.
        affine: ``(4, 4)`` float64, index → frame in mm.
        channels: names of the image's channels, such as T1w.
        limits: raw values of 0 and 1 of every channel.
        places: ``(N, 3)`` int16, foreground voxels drawn uniformly; empty if the foreground is empty.
        bounds: ``(2, 3)``, first and last + 1 foreground voxel of each axis.
        labelled: whether the last channel is a label map.
        path: the file.
        origin: which subject and session it is.
        native: the scan it was made from, if that is known.
        sums: CRC-32 of every compressed chunk.
        key: of the file, its time of change and its metadata, in the record of verified chunks.
    """

    array: Any
    affine: np.ndarray
    channels: list[str]
    limits: list[tuple[float, float]]
    places: np.ndarray
    bounds: np.ndarray
    labelled: bool
    path: str = ""
    origin: dict[str, str] = field(default_factory=dict)
    native: Native | None = None
    sums: list[int] = field(default_factory=list)
    key: tuple[str, int, int] = ("", 0, 0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along ``(D, H, W)``."""
        d, h, w = self.array.shape[1:]
        return d, h, w

    def box(self, start: Sequence[int], size: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """A box: image ``(C, *size)`` int16 in steps, foreground ``size`` bool, label ``size`` int16 or ``None``.

        Raises:
            InputError: if a chunk of it is damaged.
        """
        window = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        self._verify(start, size)
        try:
            voxels = self.array[(slice(None), *window)]
        except RuntimeError as error:
            raise InputError(_damaged(self.path)) from error
        image = voxels[: len(self.channels)]
        foreground = np.empty(image.shape[1:], bool)
        np.bitwise_and(image[0], 1, out=foreground, casting="unsafe")
        image >>= 1  # in place: at this size, fresh memory costs as much as the arithmetic
        return image, foreground, voxels[-1] if self.labelled else None

    def verify(self) -> None:
        """Verifies the whole file.

        Raises:
            InputError: if any chunk is damaged.
        """
        self._verify((0, 0, 0), self.shape)

    def _verify(self, start: Sequence[int], size: Sequence[int]) -> None:
        """Verifies the chunks that a box touches and that this process has not verified yet."""
        done = _verified.get(self.key, 0)
        for number in self._touched(start, size):
            if done >> number & 1:
                continue
            try:
                right = zlib.crc32(self.array.schunk.get_chunk(number)) == self.sums[number]
            except RuntimeError as error:
                raise InputError(_damaged(self.path)) from error
            if not right:
                raise InputError(_damaged(self.path))
            done |= 1 << number
        _verified[self.key] = done

    def _touched(self, start: Sequence[int], size: Sequence[int]) -> Iterator[int]:
        """Numbers of the chunks that a box of all channels touches."""
        counts = [math.ceil(length / side) for length, side in zip(self.array.shape, self.array.chunks, strict=True)]
        box = ((0, self.array.shape[0]), *zip(start, size, strict=True))
        ranges = [
            range(max(0, first) // side, min(math.ceil((first + number) / side), most))
            for (first, number), side, most in zip(box, self.array.chunks, counts, strict=True)
        ]
        strides = [math.prod(counts[axis + 1 :]) for axis in range(4)]
        for place in itertools.product(*ranges):
            yield sum(index * stride for index, stride in zip(place, strides, strict=True))

    def raw(self) -> np.ndarray:
        """The image in raw intensities, ``(C, D, H, W)`` float32; values clipped below the background are lost."""
        image, _, _ = self.box((0, 0, 0), self.shape)
        low, high = np.array(self.limits, np.float32).T[:, :, None, None, None]
        return low + image * np.float32(STEP) * (high - low)


def quantise(scaled: np.ndarray) -> np.ndarray:
    """Scaled values as int16 steps of 15 bits, clipped at 16 times the brightest tissue."""
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
    native: Native | None = None,
) -> int:
    """Writes a visit atomically.

    Args:
        path: the ``.b2nd`` file.
        image: ``(C, D, H, W)`` float32, scaled.
        foreground: ``(D, H, W)`` bool.
        label: ``(D, H, W)`` int16.
        affine: index → frame in mm.
        channels: name of each channel.
        limits: raw values of 0 and 1 of each channel.
        origin: subject and session.
        native: the scan it was made from.

    Returns:
        Bytes written.
    """
    coded = 2 * quantise(image) + foreground.astype(np.int16)
    stack = coded if label is None else np.concatenate([coded, label[None]])
    chunks = (1, *(min(CHUNK, length) for length in foreground.shape))
    blocks = (1, *(min(BLOCK, length) for length in foreground.shape))
    places, bounds = _outline(foreground)
    meta = {
        "version": VERSION,
        "affine": affine.ravel().tolist(),
        "channels": list(channels),
        "limits": [[float(low), float(high)] for low, high in limits],
        "step": STEP,
        "labelled": label is not None,
        "bounds": bounds.tolist(),
        "origin": origin,
        "native": native and native.as_json(),
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
        meta["layout"] = _layout(array)
        meta["sums"] = [zlib.crc32(array.schunk.get_chunk(number)) for number in range(array.schunk.nchunks)]
        text = json.dumps(meta)
        array.schunk.vlmeta[KEY] = {
            "text": text,
            "places": places.tobytes(),
            "sum": zlib.crc32(places.tobytes(), zlib.crc32(text.encode())),
        }
        del array
        return part.stat().st_size


def _outline(foreground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Random foreground voxels ``(N, 3)`` int16, and the foreground's first and last + 1 voxel per axis ``(2, 3)``."""
    index = np.argwhere(foreground)
    drawn = np.random.default_rng(0).permutation(len(index))[:PLACES]
    bounds = np.stack([index.min(0), index.max(0) + 1]) if len(index) else np.array([[0, 0, 0], foreground.shape])
    return index[drawn].astype(np.int16), bounds


def _layout(array: Any) -> list[Any]:
    """Header values that damage could change without notice."""
    sides = [[int(length) for length in part] for part in (array.shape, array.chunks, array.blocks)]
    return [*sides, str(array.dtype), int(array.schunk.nchunks)]


def _damaged(path: str | Path) -> str:
    return f"{path} is no prepared visit or is damaged; run `lssl prepare` again to restore it."


def read_stored(path: str | Path, frame: bytes | None = None) -> StoredVisit:
    """Opens a visit without reading its voxels, which costs about a tenth of a millisecond.

    Args:
        path: the file.
        frame: its bytes, if they are already in memory.
    """
    try:
        changed = 0
        if frame is None:
            changed = os.stat(path).st_mtime_ns
            array = blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
        else:
            array = blosc2.ndarray_from_cframe(frame, copy=False)
        packed = array.schunk.vlmeta[KEY]
        text, places = packed["text"], packed["places"]
        total = zlib.crc32(places, zlib.crc32(text.encode()))
        meta = json.loads(text)
        whole = total == packed["sum"] and meta["version"] == VERSION and meta["layout"] == _layout(array)
        affine = np.array(meta["affine"], float).reshape(4, 4)
        sides = np.linalg.norm(affine[:3, :3], axis=0)
        whole = whole and bool(np.isfinite(affine).all() and (sides > 0).all() and (sides < LARGEST).all())
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; run `lssl prepare` again to restore it.") from error
    except Exception as error:  # Blosc2 raises anything, even SyntaxError, on a damaged header
        raise InputError(_damaged(path)) from error
    if not whole:
        raise InputError(_damaged(path))
    return StoredVisit(
        array=array,
        affine=affine,
        channels=meta["channels"],
        limits=[(low, high) for low, high in meta["limits"]],
        places=np.frombuffer(places, np.int16).reshape(-1, 3),
        bounds=np.array(meta["bounds"]),
        labelled=meta["labelled"],
        path=str(path),
        origin=meta["origin"],
        native=meta["native"] and Native.from_json(meta["native"]),
        sums=meta["sums"],
        key=(str(path), changed, total),
    )
