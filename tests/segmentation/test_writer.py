"""Label maps on the grid, axes and codes of the file they were made from; whole or not at all."""

import nibabel as nib
import numpy as np
import pytest

from lssl.data.nifti import read_image
from lssl.segmentation.writer import _entity, write_label


@pytest.mark.parametrize("axes", ["RAS", "LPI", "SAR"])
def test_voxels_lie_where_they_did(axes, tmp_path):
    """The file's axes are turned; read in canonical axes, labelled by place, and written: back in the file's own."""
    draw = np.random.default_rng(0)
    voxels = draw.integers(0, 50, (5, 6, 7)).astype(np.int16)
    affine = np.array([[1.2, 0.1, 0, -9], [-0.1, 1.1, 0, 4], [0, 0, 2.0, 7], [0, 0, 0, 1]])
    image = nib.Nifti1Image(voxels, affine)
    ornt = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    image = image.as_reoriented(ornt)
    image.set_sform(image.affine, 4)
    source = tmp_path / "sub-01_T1w.nii.gz"
    nib.save(image, source)
    canonical, frame = read_image(str(source))
    path = tmp_path / "out" / "label.nii.gz"
    write_label(path, canonical.astype(np.int16), frame, str(source))
    written = nib.load(path)
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(image.dataobj))
    np.testing.assert_array_equal(written.affine, nib.load(source).affine)
    assert int(written.header["sform_code"]) == 4
    assert written.get_data_dtype() == np.int16
    assert [file.name for file in path.parent.iterdir()] == ["label.nii.gz"]


def test_without_a_file_it_is_written_as_it_is(tmp_path):
    write_label(tmp_path / "x.nii.gz", np.ones((2, 3, 4), np.int16), np.diag([2.0, 2, 2, 1]))
    assert nib.load(tmp_path / "x.nii.gz").affine[0, 0] == 2


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.nii.gz"
    write_label(path, np.ones((2, 3, 4), np.int16), np.eye(4))
    before = path.read_bytes()

    def half(image, name):
        name.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(nib, "save", half)
    with pytest.raises(OSError, match="disk full"):
        write_label(path, np.zeros((2, 3, 4), np.int16), np.eye(4))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_names():
    assert _entity("sub", "sub-oms01") == "sub-oms01"
    assert _entity("sub", "phantom-0001") == "sub-phantom0001"
    assert _entity("ses", "visit_2") == "ses-visit2"
