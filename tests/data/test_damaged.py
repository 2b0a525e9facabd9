"""Damage to a compressed file or a prepared visit is found, or changed nothing; the error names the file."""

from __future__ import annotations

import random

import nibabel as nib
import numpy as np
import pytest
from helpers import few

from lssl.data.duplicates import voxel_hash
from lssl.data.nifti import read_grid, read_image, read_label, read_mask
from lssl.data.store import read_stored, write_stored
from lssl.utils.errors import InputError

SHAPE = (10, 11, 12)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Cut off, or with a flipped bit, a changed byte of the header, or a run of random bytes."""
    bad = bytearray(content)
    kind = draw.randrange(4)
    if kind == 0:
        return bytes(bad[: draw.randrange(len(bad))])
    if kind == 1:
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
    elif kind == 2:
        bad[draw.randrange(min(len(bad), 400))] = draw.randrange(256)
    else:
        start = draw.randrange(len(bad))
        bad[start : start + 16] = draw.randbytes(len(bad[start : start + 16]))
    return bytes(bad)


def write(path):
    """A file of voxels from 1 to 100, and what it holds."""
    voxels = np.random.default_rng(0).integers(1, 100, SHAPE).astype(np.int16)
    if path.suffix == ".b2nd":
        write_stored(path, voxels[None] / np.float32(100), voxels > 30, voxels, np.eye(4), ["T1w"], [(0, 1)], {})
    else:
        kind = nib.MGHImage if path.suffix in (".mgh", ".mgz") else nib.Nifti1Image
        nib.save(kind(voxels.astype(np.float32), np.eye(4)), path)
    return path.read_bytes(), voxels


def everything(path):
    """All that a run reads of a file."""
    if path.suffix == ".b2nd":
        stored = read_stored(path)
        return stored.box((0, 0, 0), SHAPE)[2], stored.affine
    for read in (read_grid, read_label, read_mask, voxel_hash):
        read(str(path))
    return read_image(str(path))


@pytest.mark.parametrize("name", few(["x.nii.gz", "x.mgz", "x.b2nd", "x.nii", "x.mgh"], 3))
def test_damage_is_found_and_named(name, tmp_path):
    path, draw = tmp_path / name, random.Random(0)
    good, voxels = write(path)
    messages = []
    for _ in range(120):
        path.write_bytes(damaged(good, draw))
        try:
            found, affine = everything(path)
        except InputError as error:
            messages.append(str(error))
            continue
        if path.suffix not in (".nii", ".mgh"):  # these have no checksum
            np.testing.assert_array_equal(found, voxels)
            np.testing.assert_array_equal(affine, np.eye(4))
    assert len(messages) > 30
    assert all(str(path) in message for message in messages)
