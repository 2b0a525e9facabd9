"""Damaged images, visit files and checkpoints: one sentence or the right voxels, never a traceback or wrong ones."""

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from mutations import damages, read_or_sentence, tried

from lssl.checkpoint import read_checkpoint
from lssl.data.nifti import read_grid, read_image, read_label, read_mask
from lssl.data.store import read_stored, write_stored

AFFINE = np.array([[0.0, -2, 0, 9], [1, 0, 0, -7], [0, 0, 3, 4], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A label map as .nii and .nii.gz: every reader can read it."""
    folder = tmp_path_factory.mktemp("images")
    voxels = np.random.default_rng(0).integers(0, 900, (9, 8, 7)).astype(np.int16)
    for end in (".nii", ".nii.gz"):
        nib.save(nib.Nifti1Image(voxels, AFFINE), folder / f"a{end}")
    return folder


@tried(4)
@given(damage=damages())
def test_a_damaged_nifti(images, damage):
    path = images / "damaged.nii"
    path.write_bytes(damage((images / "a.nii").read_bytes()))
    for read in (read_grid, read_image, read_label, read_mask):
        found = read_or_sentence(read, str(path))
        if read is read_image and found:
            assert np.isfinite(found[0]).all()
            assert abs(np.linalg.det(found[1])) > 0


@tried(4)
@given(damage=damages())
def test_a_damaged_gzip_gives_no_other_voxels(images, damage):
    path = images / "damaged.nii.gz"
    path.write_bytes(damage((images / "a.nii.gz").read_bytes()))
    right, affine = read_image(str(images / "a.nii.gz"))
    found = read_or_sentence(read_image, str(path))
    if found:
        np.testing.assert_array_equal(found[0], right)
        np.testing.assert_array_equal(found[1], affine)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "a.b2nd"
    draw = np.random.default_rng(0)
    foreground = np.zeros((20, 24, 22), bool)
    foreground[4:16, 5:20, 3:18] = True
    image = (foreground * draw.random((1, *foreground.shape))).astype(np.float32)
    label = (foreground * draw.integers(0, 9, foreground.shape)).astype(np.int16)
    write_stored(path, image, foreground, label, np.eye(4), ["T1w"], [(0.0, 1.0)], {"subject": "a"})
    return path


@tried(4)
@given(damage=damages())
def test_a_damaged_visit_gives_no_other_voxels(stored, damage):
    path = stored.with_name("damaged.b2nd")
    path.write_bytes(damage(stored.read_bytes()))
    found = read_or_sentence(_whole, path)
    for one, other in zip(found or (), _whole(stored) if found else (), strict=True):
        np.testing.assert_array_equal(one, other)


def _whole(path):
    visit = read_stored(path)
    return *visit.box((0, 0, 0), visit.shape), visit.affine, visit.places


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "a.ckpt"
    config = "model: {class_path: LongitudinalLocal}\nbackbone: {}\nviews: {size: 32}\n"
    torch.save({"state_dict": {"a": torch.arange(999.0)}, "lssl": {"config": config, "format": 3}}, path)
    return path


@tried(2)
@given(damage=damages())
def test_a_damaged_checkpoint(checkpoint, damage):
    path = checkpoint.with_name("damaged.ckpt")
    path.write_bytes(damage(checkpoint.read_bytes()))
    found = read_or_sentence(read_checkpoint, path)
    assert found is None or found["state_dict"].keys() == {"a"}
