"""The visit file: what goes in comes out, box by box, and a broken file says so."""

from __future__ import annotations

import numpy as np
import pytest

from lssl.data import STEP, store
from lssl.data.nifti import intensity_range, scale
from lssl.data.store import Native, quantise, read_stored, write_stored
from lssl.utils.errors import InputError
from lssl.utils.files import atomic_write, fingerprint

SHAPE = (70, 40, 50)
AFFINE = np.diag([1.0, 1.0, 1.0, 1.0])
AFFINE[:3, 3] = (-3, 5, 7)


@pytest.fixture
def visit(tmp_path):
    rng = np.random.default_rng(0)
    foreground = np.zeros(SHAPE, bool)
    foreground[10:50, 5:30, 8:40] = True
    raw = np.stack([foreground * rng.gamma(5, 40, SHAPE), foreground * rng.gamma(3, 900, SHAPE)]).astype(np.float32)
    limits = [intensity_range(image, foreground) for image in raw]
    scaled = np.stack([scale(image, foreground, one) for image, one in zip(raw, limits, strict=True)])
    label = rng.integers(0, 2000, SHAPE).astype(np.int16)
    path = tmp_path / "v.b2nd"
    size = write_stored(path, scaled, foreground, label, AFFINE, ["T1w", "FLAIR"], limits, {"subject": "a"})
    assert size == path.stat().st_size
    return path, raw, scaled, foreground, label


def test_a_box_is_the_part_of_the_whole(visit):
    path, _, scaled, foreground, label = visit
    stored = read_stored(path)
    assert stored.shape == SHAPE
    assert stored.channels == ["T1w", "FLAIR"]
    assert stored.origin == {"subject": "a"}
    np.testing.assert_array_equal(stored.affine, AFFINE)
    image, mask, classes = stored.box((30, 2, 11), (33, 20, 17))
    window = (slice(30, 63), slice(2, 22), slice(11, 28))
    assert image.dtype == np.int16
    np.testing.assert_allclose(image * STEP, scaled[(slice(None), *window)], atol=0.51 * STEP)
    np.testing.assert_array_equal(mask, foreground[window])
    np.testing.assert_array_equal(classes, label[window])


def test_raw_intensities_come_back(visit):
    path, raw, *_ = visit
    stored = read_stored(path)
    steps = [STEP * (high - low) for low, high in stored.limits]
    for number in range(2):
        assert np.abs(stored.raw()[number] - raw[number]).max() <= 0.51 * steps[number]
    error = (stored.raw()[0] - raw[0])[raw[0] > 0]
    assert error.std() / raw[0][raw[0] > 0].std() < 3e-3


def test_signed_images_come_back_above_their_background(tmp_path):
    rng = np.random.default_rng(0)
    foreground = np.ones(SHAPE, bool)
    raw = rng.standard_normal(SHAPE).astype(np.float32)
    limits = intensity_range(raw, foreground)
    write_stored(tmp_path / "v", scale(raw, foreground, limits)[None], foreground, None, AFFINE, ["T1w"], [limits], {})
    back = read_stored(tmp_path / "v").raw()[0]
    kept = raw >= limits[0]
    assert kept.mean() > 0.998
    assert np.abs(back - raw)[kept].max() <= 0.51 * STEP * (limits[1] - limits[0])


def test_places_and_bounds_tell_of_the_foreground(visit):
    stored = read_stored(visit[0])
    assert len(stored.places) == 512
    assert visit[3][tuple(stored.places.T)].all()
    assert stored.bounds.tolist() == [[10, 5, 8], [50, 30, 40]]
    assert np.abs(stored.places.mean(0) - [29.5, 17, 23.5]).max() < 2
    assert not stored.box((0, 0, 0), (2, 2, 2))[1].any()


def test_the_brightest_voxels_are_cut_off_not_wrapped():
    assert quantise(np.array([0.0, 1.0, 40.0, -40.0])).tolist() == [0, 1000, 16383, -16384]


@pytest.mark.parametrize("damage", ["missing", "text", "short"])
def test_broken_files_are_named(damage, visit):
    path = visit[0]
    content = path.read_bytes()
    path.unlink()
    if damage == "text":
        path.write_text("no array" * 100)
    if damage == "short":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"v.b2nd .*run `lssl prepare` again"):
        read_stored(path).box((0, 0, 0), (8, 8, 8))


def test_nothing_half_written_takes_the_name(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def interrupted() -> None:
        with atomic_write(target) as part:
            part.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_touched_file_is_read_again_and_found_the_same(tmp_path):
    path = tmp_path / "x"
    path.write_text("one")
    known = fingerprint(str(path))
    assert fingerprint(str(path), known) is known
    path.write_text("two")
    assert fingerprint(str(path), known)["hash"] != known["hash"]


def test_a_flipped_bit_never_becomes_a_voxel(visit, tmp_path):
    """Anywhere in the file, above all in its header and metadata: refused, or without any effect."""
    path = visit[0]
    whole = read_stored(path)
    truth, content = whole.box((0, 0, 0), SHAPE), path.read_bytes()
    rng, damaged, refused = np.random.default_rng(0), tmp_path / "damaged.b2nd", 0
    last = len(content)
    for low, high in ((0, last), (0, 300), (last - 1500, last)):
        for place in rng.integers(low, high, 100):
            flipped = bytearray(content)
            flipped[place] ^= 1 << int(rng.integers(8))
            damaged.write_bytes(flipped)
            store._verified.clear()
            try:
                read = read_stored(damaged)
                found = read.box((0, 0, 0), SHAPE)
            except InputError:
                refused += 1
                continue
            for one, other in zip(found, truth, strict=True):
                np.testing.assert_array_equal(one, other)
            np.testing.assert_array_equal(read.affine, whole.affine)
            np.testing.assert_array_equal(read.places, whole.places)
            assert read.limits == whole.limits
    assert refused > 200


def test_a_box_verifies_the_chunks_that_it_touches(visit):
    stored = read_stored(visit[0])
    assert list(stored._touched((0, 0, 0), (64, 40, 50))) == [0, 2, 4]  # 3 channels of 2 chunks along the first axis
    assert list(stored._touched((64, 0, 0), (1, 1, 1))) == [1, 3, 5]
    assert list(stored._touched((63, 0, 0), (2, 1, 1))) == [0, 1, 2, 3, 4, 5]


def test_a_visit_knows_the_scan_it_came_from(tmp_path):
    rng = np.random.default_rng(0)
    native = Native("scan.nii.gz", (5, 6, 7), np.diag([2.0, 2.0, 2.0, 1.0]), np.linalg.inv(rng.random((4, 4))))
    foreground = np.ones((8, 8, 8), bool)
    write_stored(
        tmp_path / "v", rng.random((1, 8, 8, 8)), foreground, None, AFFINE, ["T1w"], [(0, 1)], {}, native=native
    )
    back = read_stored(tmp_path / "v").native
    assert (back.file, back.shape) == (native.file, native.shape)
    np.testing.assert_array_equal(back.affine, native.affine)
    np.testing.assert_array_equal(back.matrix, native.matrix)


def test_a_file_that_is_damaged_after_it_was_read_is_verified_anew(visit):
    path = visit[0]
    size = path.stat().st_size
    read_stored(path).box((0, 0, 0), SHAPE)
    whole = bytearray(path.read_bytes())
    refused = 0
    for place in range(size // 4, size // 2, size // 40):
        damaged = bytearray(whole)
        damaged[place] ^= 16
        path.write_bytes(damaged)
        try:
            read_stored(path).box((0, 0, 0), SHAPE)
        except InputError:
            refused += 1
    assert refused >= 9
