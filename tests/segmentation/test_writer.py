"""Label maps on the grid, axes and codes of the file they were made from; whole or not at all."""

from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.transform import Rotation

from lssl.data.batch import Visit, collate
from lssl.data.nifti import read_image
from lssl.data.store import Native
from lssl.segmentation.native import to_native
from lssl.segmentation.writer import SegmentationWriter, entities, write_label


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
    assert entities("sub", ["sub-oms01", "phantom-0001"]) == {
        "sub-oms01": "sub-oms01",
        "phantom-0001": "sub-phantom0001",
    }
    assert entities("ses", ["visit_2", "visit_2"]) == {"visit_2": "ses-visit2"}


def test_distinct_visits_have_distinct_files(tmp_path):
    """Names that are equal in BIDS' alphabet: six visits became four label maps."""
    names = [("01-A", "a"), ("01A", "a"), ("../../x", "a"), ("x", "a"), ("sub-x", "a"), ("__", "a_b"), ("__", "ab")]
    table = pd.DataFrame(names, columns=["subject", "session"]).assign(age=1.0, time=0.0)
    data = SimpleNamespace(table=table, location="odd names")
    trainer = SimpleNamespace(datamodule=data, default_root_dir=tmp_path / "run", is_global_zero=True, ckpt_path=None)
    classes = SimpleNamespace(names=["brain"], values=[[1]])
    model, writer = SimpleNamespace(known_classes=lambda: classes, classes=classes, results=None), SegmentationWriter()
    with pytest.warns(UserWarning, match="'01-A' → sub-01Ax"):
        writer.on_predict_start(trainer, model)
    for row in range(len(table)):
        label = torch.zeros(4, 4, 4)
        label.view(-1)[: row + 1] = 1
        empty = torch.zeros(4, 4, 4)
        visit = Visit(empty[None], torch.eye(4).double(), empty.bool(), session=row)
        batch = collate([(visit, visit)])
        writer.on_predict_batch_end(trainer, model, {"label": label}, batch, row)
    files = list(tmp_path.rglob("*.nii.gz"))
    assert all((tmp_path / "run") in path.parents for path in files)
    assert len({str(path).casefold() for path in files}) == len(files)
    assert sorted(int(nib.load(path).get_fdata().sum()) for path in files) == list(range(1, len(table) + 1))


def test_mgz_and_an_empty_sform_keep_their_own_grid(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 50, (5, 6, 7)).astype(np.int16)
    affine = np.array([[0, 0, 2.0, -9], [-1.1, 0, 0, 4], [0, 1.2, 0, 7], [0, 0, 0, 1]])
    image = nib.Nifti1Image(voxels, affine)
    image.set_qform(affine, 1)
    image.set_sform(np.zeros((4, 4)), 1)
    nib.save(image, tmp_path / "a.nii.gz")
    nib.save(nib.MGHImage(voxels.astype(np.int32), affine), tmp_path / "b.mgz")
    for name in ("a.nii.gz", "b.mgz"):
        canonical, frame = read_image(str(tmp_path / name))
        write_label(tmp_path / "out.nii.gz", canonical.astype(np.int16), frame, str(tmp_path / name))
        written = nib.load(tmp_path / "out.nii.gz")
        np.testing.assert_array_equal(np.asarray(written.dataobj), voxels)
        np.testing.assert_allclose(written.affine, affine, atol=1e-5)


def test_a_prepared_label_goes_back_to_the_scan_it_came_from(tmp_path):
    """Every voxel of the scan takes the class that the frame holds at its place, found here by brute force."""
    shape = (24, 26, 22)
    frame = np.diag([2.0, 2.0, 2.0, 1.0])
    frame[:3, 3] = (-23, -25, -21)
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_rotvec([0.2, -0.1, 0.3]).as_matrix()
    turn[:3, 3] = (4, -6, 3)
    native = Native("", (20, 18, 25), np.diag([2.5, 3.0, 2.0, 1.0]) @ turn, turn)
    native.affine[:3, 3] = (-20, -24, -22)
    balls = [((0, 0, 0), 12, 41), ((9, 4, -3), 6, 7)]

    def truth(points):
        found = np.zeros(points.shape[:-1], np.int16)
        for centre, radius, value in balls:
            found[np.linalg.norm(points - np.array(centre), axis=-1) < radius] = value
        return found

    def places(affine, size):
        index = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"), -1)
        return index @ affine[:3, :3].T + affine[:3, 3]

    label = truth(places(frame, shape))
    found = to_native(label, frame, native)
    expected = truth(places(np.linalg.inv(native.matrix) @ native.affine, native.shape))
    for value in (7, 41):
        dice = 2 * ((found == value) & (expected == value)).sum() / ((found == value).sum() + (expected == value).sum())
        assert dice > 0.9
    wrong = truth(places(native.affine, native.shape))  # without the map
    assert 2 * ((found == 7) & (wrong == 7)).sum() / ((found == 7).sum() + (wrong == 7).sum()) < 0.6
