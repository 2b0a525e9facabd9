"""Headers: units, codes, formats, tolerance; and files that are refused in one sentence."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from lssl.data import nifti
from lssl.data.nifti import Grid, read_grid, read_image, read_label
from lssl.utils.errors import InputError
from lssl.utils.memory import refuse_larger_than_memory

VOXELS = np.random.default_rng(0).integers(0, 1000, (20, 24, 18)).astype(np.int16)
AFFINE = np.array([[3.0, 0, 0, -20], [0, 3, 0, 5], [0, 0, 3, 7], [0, 0, 0, 1]])


def save(path, image):
    nib.save(image, path)
    return str(path)


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1), ("meter", 1e-3), ("micron", 1e3), ("unknown", 1)])
def test_lengths_are_read_in_mm(unit, factor, tmp_path):
    affine = AFFINE.copy()
    affine[:3] *= factor
    image = nib.Nifti1Image(VOXELS, affine)
    image.header.set_xyzt_units(unit)
    path = save(tmp_path / "x.nii.gz", image)
    np.testing.assert_allclose(read_grid(path).affine, AFFINE, rtol=1e-6)
    np.testing.assert_allclose(read_image(path)[1], AFFINE, rtol=1e-6)


@pytest.mark.parametrize("side", [3000.0, 0.003])
def test_implausible_lengths_are_refused(side, tmp_path):
    path = save(tmp_path / "x.nii", nib.Nifti1Image(VOXELS, np.diag([side, side, side, 1])))
    with pytest.raises(InputError, match=r"x.nii would be .* mm long by its header"):
        read_grid(path)


def test_codes_of_zero_are_refused_by_whoever_reads(tmp_path):
    image = nib.Nifti1Image(VOXELS, AFFINE)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    path = save(tmp_path / "x.nii", image)
    for read in (read_grid, read_image, read_label):
        with pytest.raises(InputError, match="says nothing of its orientation"):
            read(path)
    assert read_grid(path, strict=False).shape.tolist() == list(VOXELS.shape)


def test_an_empty_sform_gives_way_to_a_good_qform(tmp_path):
    image = nib.Nifti1Image(VOXELS, AFFINE)
    image.set_qform(AFFINE, 1)
    image.set_sform(np.zeros((4, 4)), 1)
    path = save(tmp_path / "x.nii", image)
    np.testing.assert_allclose(read_grid(path).affine, AFFINE)
    np.testing.assert_array_equal(read_image(path)[0], VOXELS)


def test_mgz_is_read_and_analyze_refused(tmp_path):
    path = save(tmp_path / "x.mgz", nib.MGHImage(VOXELS.astype(np.int32), AFFINE))
    np.testing.assert_array_equal(read_image(path)[0], VOXELS)
    np.testing.assert_allclose(read_grid(path).affine, AFFINE)
    path = save(tmp_path / "y.img", nib.AnalyzeImage(VOXELS, AFFINE))
    with pytest.raises(InputError, match=r"y.img is Analyze 7.5"):
        read_image(path)


@pytest.mark.parametrize("name", ["x.nii.gz", "x.mgz", "x.img.gz"])
def test_a_flipped_bit_never_becomes_a_voxel(name, tmp_path):
    kind = {"x.nii.gz": nib.Nifti1Image, "x.mgz": nib.MGHImage, "x.img.gz": nib.Nifti1Pair}[name]
    path = tmp_path / name
    nib.save(kind(VOXELS.astype(np.int32), AFFINE), str(path))
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        flipped = bytearray(content)
        place = rng.integers(40, len(content))  # a gzip header holds a time and a name, no voxels
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        with pytest.raises(InputError):
            read_image(str(path))


def test_content_that_was_not_fetched_is_named(tmp_path):
    (tmp_path / "x.nii.gz").symlink_to("../.git/annex/objects/none.nii.gz")
    with pytest.raises(InputError, match="datalad get"):
        read_grid(str(tmp_path / "x.nii.gz"))
    (tmp_path / "y.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n")
    with pytest.raises(InputError, match="git lfs pull"):
        read_grid(str(tmp_path / "y.nii.gz"))


def test_grids_agree_to_a_hundredth_of_a_voxel_everywhere():
    def moved(shift=0.0, angle=0.0):
        affine = AFFINE.copy()
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        affine = affine @ turn
        affine[0, 3] += shift
        return Grid(np.array(VOXELS.shape), affine)

    plain = moved()
    assert plain.same(moved(0.002))
    assert plain.same(moved(0.029))
    assert not plain.same(moved(0.031))
    # 1 mrad moves the far corner by 0.001 · √(19² + 23²) voxels, though no entry of the affine by more than 0.003 mm.
    assert plain.distance(moved(angle=1e-3)) == pytest.approx(3e-3 * np.hypot(19, 23), rel=1e-3)
    assert not plain.same(moved(angle=1e-3))


def test_labels_are_rounded_or_named(tmp_path):
    near = np.full(VOXELS.shape, 1023.9999, np.float32)
    assert (read_label(save(tmp_path / "a.nii", nib.Nifti1Image(near, AFFINE))) == 1024).all()
    large = save(tmp_path / "b.nii", nib.Nifti1Image(np.full(VOXELS.shape, 41203, np.int32), AFFINE))
    with pytest.raises(InputError, match="holds the class 41203"):
        read_label(large)
    near[0, 0, 0] = np.nan
    with pytest.raises(InputError, match="holds nan and 0 other values"):
        read_label(save(tmp_path / "c.nii", nib.Nifti1Image(near, AFFINE)))


def test_memory_is_asked_before_it_is_taken(tmp_path, monkeypatch):
    path = tmp_path / "x.nii"
    save(path, nib.Nifti1Image(VOXELS, AFFINE * [[0.01], [0.01], [0.01], [1]]))
    content = bytearray(path.read_bytes())
    content[42:48] = np.array([32000, 32000, 32000], "<i2").tobytes()
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x.nii needs 1.97e\+05 GB of memory"):
        nifti.read_image(str(path))
    refuse_larger_than_memory(1000, "A little", "never mind")


def test_an_unknown_unit_of_length_is_named(tmp_path):
    image = nib.Nifti1Image(np.ones((9, 9, 9), np.int16), np.diag([2.0, 2, 2, 1]))
    image.header["xyzt_units"] = 128 + 5
    path = str(tmp_path / "a.nii.gz")
    nib.save(image, path)
    with pytest.raises(InputError, match=r"a.nii.gz has lengths in the unit .* which NIfTI does not know"):
        read_image(path)
