"""Non-rigid change: a known motion of tissue is found, alike in both directions, and said in files and tables."""

# ruff: noqa: F811

from __future__ import annotations

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.image import imread
from prepared_cohort import bids, master, prepare  # noqa: F401
from scipy.ndimage import gaussian_filter

from lssl.data.fields import VisitField, read_field, write_field
from lssl.data.nifti import automatic_foreground
from lssl.prepare import change as module
from lssl.prepare import runner
from lssl.prepare.change import field_between, measure_change, tissue_fields, write_changes
from lssl.prepare.cohort import Options, Session
from lssl.prepare.commands import _about_change
from lssl.prepare.picture import draw_change
from lssl.prepare.scans import Overlay, Scans
from lssl.prepare.velocity import determinant, exponential, velocities
from lssl.prepare.volumes import FrameGrid, Volume
from lssl.utils.errors import InputError
from lssl.views import geometry as geo

CENTRE, REACH = np.array([14.0, 10.0, 6.0]), 45.0


def swelling(points: np.ndarray, strength: float = 0.15) -> np.ndarray:
    """mm by which tissue at ``(..., 3)`` moves: away from a place off all axes, and to the side."""
    apart = points - CENTRE
    weight = np.maximum(1 - (apart**2).sum(-1, keepdims=True) / REACH**2, 0) ** 2
    return weight * (strength * apart + np.array([2.5, -1.5, 1.0]))


def later(points: np.ndarray) -> np.ndarray:
    """Where what lies at ``points`` at the second visit came from."""
    found = points.copy()
    for _ in range(30):
        found = points - swelling(found)
    return found


def texture(points: np.ndarray) -> np.ndarray:
    """A ball of smooth random brightness at ``(..., 3)``."""
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((24, 3))
    vectors *= (2 * np.pi / rng.uniform(22, 45, 24) / np.linalg.norm(vectors, axis=1))[:, None]
    waves = np.sin(points @ vectors.T + rng.uniform(0, 2 * np.pi, 24)).sum(-1) / np.sqrt(12)
    return (200 + 50 * waves) / (1 + np.exp((np.linalg.norm(points, axis=-1) - 66) / 3))


@pytest.fixture(scope="module")
def pair() -> list[Volume]:
    """A ball before and after the swelling, 6 mm, with noise, another gain and gamma."""
    affine = np.diag([6.0, 6.0, 6.0, 1.0])
    affine[:3, 3] = -78.0
    index = np.stack(np.meshgrid(*[np.arange(27)] * 3, indexing="ij"), -1)
    points = index @ affine[:3, :3].T + affine[:3, 3]
    rng = np.random.default_rng(0)
    found = []
    for places, gamma in ((points, 1.0), (later(points), 1.1)):
        image = texture(places).clip(0) ** gamma * np.exp(0.1 * (gamma > 1) * points[..., 1] / 80)
        image = np.abs(image + 4 * rng.standard_normal(image.shape)).astype(np.float32)
        found.append(Volume(image, affine, automatic_foreground(image)))
    return found


@pytest.fixture(scope="module")
def change(pair):
    return tissue_fields(pair, [np.eye(4)] * 2, 6.0, 8.0)


def inside() -> np.ndarray:
    """Places in the head near the swelling."""
    rng = np.random.default_rng(1)
    return CENTRE + rng.uniform(-25, 25, (400, 3))


def errors(points: np.ndarray, moved: np.ndarray) -> float:
    return float(np.linalg.norm(points + swelling(points) - moved, axis=1).mean())


def test_a_planted_motion_is_found_through_the_stored_fields(change):
    """With a wrong sign or axis, the points end farther away than without a field."""
    first, second = change.stored(0), change.stored(1)
    points = inside()
    field = torch.from_numpy(field_between(first, second))[None].double()
    moved = geo.displace(torch.from_numpy(points)[None], field, torch.from_numpy(first.affine)[None])[0].numpy()
    still = errors(points, points)
    assert still > 2.0
    assert errors(points, moved) < 0.4 * still


def test_stored_fields_lie_where_they_were_found(monkeypatch):
    """Knots are every other voxel of 2 mm here; half a voxel off, or an axis, and the two ways to a place differ."""
    size, origin = (21, 17, 19), (-20.0, -10.0, 5.0)
    rng = np.random.default_rng(2)
    velocity = [gaussian_filter(rng.standard_normal((3, 11, 9, 10)) * 20, (0, 1.5, 1.5, 1.5)) for _ in range(2)]
    monkeypatch.setattr(module, "velocities", lambda *_: velocity)
    made = module.Change(FrameGrid(size, 2.0, origin), [], [np.ones(size, bool)] * 2)
    index = torch.from_numpy(np.argwhere(np.ones([n - 1 for n in size]))).double()[None]
    points = geo.transform(torch.from_numpy(made.grid.affine)[None], index)
    stored = made.stored(0), made.stored(1)
    field = torch.from_numpy(field_between(*stored))[None].double()
    moved = geo.displace(points, field, torch.from_numpy(stored[0].affine)[None])
    wanted = made.between(0, 1)[:, :-1, :-1, :-1].reshape(3, -1).T
    assert np.abs(wanted).max() > 2
    np.testing.assert_allclose((moved - points)[0].numpy(), wanted, atol=1e-3)


def test_no_visit_is_the_reference(pair, change):
    other = tissue_fields(pair[::-1], [np.eye(4)] * 2, 6.0, 8.0)
    np.testing.assert_allclose(other.to_visit[1], change.to_visit[0], atol=2e-3)
    np.testing.assert_allclose(other.from_visit[0], change.from_visit[1], atol=2e-3)


def test_fields_lead_back(change):
    first, second = change.stored(0), change.stored(1)
    ahead, back = field_between(first, second), field_between(second, first)
    points = torch.from_numpy(inside())[None]
    affine = torch.from_numpy(first.affine)[None]
    there = geo.displace(points, torch.from_numpy(ahead)[None].double(), affine)
    home = geo.displace(there, torch.from_numpy(back)[None].double(), affine)
    away = (home - points).norm(dim=-1)
    assert away.mean() < 0.1
    assert (change.volumes(0, 1) > 0).all()


def test_the_mean_of_three_visits_lies_between_them(pair):
    images = [volume.voxels / 300 for volume in (*pair, pair[0])]
    fields = velocities(images, [volume.foreground for volume in (*pair, pair[0])], 6.0)
    assert np.abs(fields[1]).max() > 0.5
    np.testing.assert_allclose(np.sum(fields, 0), 0, atol=1e-4)
    np.testing.assert_allclose(fields[0], fields[2], atol=1e-3)


def test_visits_that_are_alike_do_not_move(pair):
    image = pair[0].voxels / 300
    noise = np.random.default_rng(3).standard_normal((2, *image.shape)).astype(np.float32) * 0.015
    fields = velocities([image + noise[0], 1.3 * (image + noise[1])], [pair[0].foreground] * 2, 6.0)
    assert np.abs(fields[0])[:, pair[0].foreground].mean() < 0.1


def test_volumes_tell_growth_from_shrinkage():
    index = np.stack(np.meshgrid(*[np.arange(12.0)] * 3, indexing="ij"))
    growth = np.array([0.1, 0.0, -0.05])[:, None, None, None] * index * 2.0
    np.testing.assert_allclose(determinant(growth, 2.0), 1.1 * 0.95, rtol=1e-5)


def test_volumes_of_any_linear_map():
    matrix = np.random.default_rng(3).normal(0, 0.2, (3, 3))
    places = 2.0 * np.indices((5, 6, 7), dtype=np.float64)
    moved = np.einsum("ij,j...->i...", matrix, places)
    np.testing.assert_allclose(determinant(moved, 2.0), np.linalg.det(np.eye(3) + matrix), rtol=1e-5)


def test_a_velocity_and_its_negative_undo_each_other():
    index = np.stack(np.meshgrid(*[np.arange(16.0)] * 3, indexing="ij")).astype(np.float32)
    velocity = np.sin(index[[1, 2, 0]] * np.pi / 15) * np.prod(np.sin(index * np.pi / 15), 0)
    ahead, back = exponential(velocity), exponential(-velocity)
    assert np.abs(ahead + back).max() > 0.1  # no mere change of sign
    points = torch.from_numpy(np.argwhere(np.ones((16, 16, 16)))).double()[None]
    there = geo.displace(points, torch.from_numpy(ahead)[None].double(), torch.eye(4).double()[None])
    home = geo.displace(there, torch.from_numpy(back)[None].double(), torch.eye(4).double()[None])
    assert (home - points).abs().max() < 0.1


def test_a_field_file_comes_back_or_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    fields = rng.uniform(-5, 5, (2, 3, 4, 5, 6)).astype(np.float32)
    path = tmp_path / "a_field.npz"
    write_field(path, VisitField(fields[0], fields[1], np.diag([4.0, 4, 4, 1])))
    found = read_field(path)
    np.testing.assert_allclose(found.to_visit, fields[0], atol=0.005)
    np.testing.assert_allclose(found.from_visit, fields[1], atol=0.005)
    np.testing.assert_array_equal(found.affine, np.diag([4.0, 4, 4, 1]))
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 255
    path.write_bytes(whole)
    with pytest.raises(InputError, match="damaged"):
        read_field(path)
    with pytest.raises(InputError, match="does not exist"):
        read_field(tmp_path / "none.npz")


def test_percent_changes_come_from_one_label_map_of_any_visit(pair, tmp_path):
    """A ball grows by 40 % in places; its label map is that of the later visit, in which it is larger already."""
    index = np.stack(np.meshgrid(*[np.arange(27)] * 3, indexing="ij"), -1)
    points = index @ pair[0].affine[:3, :3].T + pair[0].affine[:3, 3]
    before, after = (np.linalg.norm(places - CENTRE, axis=-1) < 20 for places in (points, later(points)))
    label = Overlay(5 * after.astype(np.int16), pair[0].affine, 1, False)
    sessions = [Session(name, {"T1w": f"{name}.nii"}) for name in ("ses-1", "ses-2", "ses-3")]
    scans = Scans(sessions, [[volume] for volume in (*pair, pair[0])], [None] * 3, [None, label, None])
    rows = [{"image": f"visits/a/{n}.b2nd", "aligned": n < 2, "flags": []} for n in range(3)]
    table = measure_change(scans, rows, [np.eye(4)] * 3, Options(spacing=6.0), tmp_path)
    assert [row["structure"] for row in table] == ["5", "tissue"]
    assert (table[0]["from"], table[0]["to"]) == ("ses-1", "ses-2")
    true = 100 * (after.sum() / before.sum() - 1)
    assert true > 30
    assert table[0]["percent_change"] == pytest.approx(true, rel=0.5)  # penalties make changes smaller
    assert table[0]["ml"] == pytest.approx(before.sum() * 0.216, rel=0.15)
    assert [row["field"] for row in rows] == [
        "visits/a/0_field.npz",
        "visits/a/1_field.npz",
        "",
    ]  # the last is in doubt
    assert [row["folding"] for row in rows[:2]] == [0, 0]
    assert rows[0]["change_mm"] == 0 < rows[1]["change_mm"]
    factor = nib.load(tmp_path / "visits/a/1_jacobian.nii.gz")
    i, j, k = np.rint(np.linalg.inv(factor.affine) @ [*CENTRE, 1])[:3].astype(int)
    assert factor.get_fdata()[i, j, k] > 1.2  # where the first visit has it: the map of the second ends 3 mm away
    assert not (tmp_path / "visits/a/0_jacobian.nii.gz").exists()
    assert (tmp_path / "pictures/a.change.png").stat().st_size > 10_000


def test_growth_is_red_on_its_side_and_loss_blue(tmp_path):
    """The patient's right, of high indices, is on the left of axial and coronal slices."""
    ground = np.zeros((40, 44, 36), np.float32)
    ground[4:-4, 4:-4, 4:-4] = 0.6
    factor = np.ones_like(ground)
    factor[26:34, 15:30, 10:28], factor[6:14, 15:30, 10:28] = 1.3, 0.7
    draw_change(tmp_path / "x.png", "x", ground, {"later": factor}, np.diag([2.0, 2.0, 2.0, 1.0]))
    image = imread(tmp_path / "x.png")[..., :3]
    image = image[:, : image.shape[1] * 2 // 3]  # axial and coronal; all else is grey
    for panel in np.split(image[:, : image.shape[1] // 2 * 2], 2, 1):
        (r, g, b), columns = panel.transpose(2, 0, 1), np.arange(panel.shape[1])
        red, blue = columns[((r > b + 0.1) & (r > g + 0.1)).sum(0) > 20], columns[(b > r + 0.1).sum(0) > 20]
        assert min(len(red), len(blue)) > 40
        assert red.max() < blue.min()


def test_a_table_without_rows_is_explained(tmp_path):
    write_changes(tmp_path / "change.tsv", [])
    assert "as these take label maps or brain masks" in _about_change(tmp_path / "change.tsv")


@pytest.mark.slow
def test_prepare_writes_fields_maps_and_percent_changes(bids, tmp_path, capsys, monkeypatch):
    """The label map of the later visit stands for both; a subject that was seen once has no field."""
    label = nib.load(next(bids.glob("sub-a/ses-M012/anat/*.nii.gz")))
    voxels = np.zeros(label.shape, np.int16)
    voxels[8:14, 8:14, 8:14], voxels[8:14, 14:18, 8:14] = 3, 17
    place = bids / "derivatives/x/sub-a/ses-M012/anat/sub-a_ses-M012_dseg.nii.gz"
    place.parent.mkdir(parents=True)
    nib.save(nib.Nifti1Image(voxels, label.affine), place)
    out = tmp_path / "out"
    assert prepare(bids, out, "--nonrigid") == 0
    assert "change.tsv" in capsys.readouterr().out
    quality = pd.read_csv(out / "quality.csv")
    fields = quality["field"].tolist()
    assert fields[0] == "visits/sub-a/sub-a_ses-M000_field.npz"
    assert pd.isna(fields[2:]).all()
    assert quality["folding"].tolist()[:2] == [0, 0]
    assert quality["change_mm"][0] == 0 < quality["change_mm"][1]
    stored = [read_field(out / name) for name in fields[:2]]
    np.testing.assert_array_equal(stored[0].affine, stored[1].affine)
    factor = nib.load(out / "visits/sub-a/sub-a_ses-M012_jacobian.nii.gz")
    assert factor.get_fdata().min() > 0
    assert not list(out.rglob("*M000_jacobian*"))
    table = pd.read_csv(out / "change.tsv", sep="\t", dtype={"structure": str})
    assert table["structure"].tolist() == ["3", "17", "tissue"]
    assert (table["from"] + table["to"]).unique().tolist() == ["ses-M000ses-M012"]
    assert table["years"].tolist() == pytest.approx([1, 1, 1], abs=0.01)
    assert table["ml"][0] == pytest.approx(6**3 * 0.512, rel=0.15)
    monkeypatch.setattr(runner, "prepare_subject", None)
    assert prepare(bids, out, "--nonrigid") == 0
    (out / fields[1]).unlink()
    assert prepare(bids, out, "--nonrigid") == 1  # it would be made again
