"""Cohorts from label maps: reproducible, split by map, and mistakes that stop early."""

# ruff: noqa: F811

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from small_maps import REAL, SPACING, data, make, maps, row, write  # noqa: F401

from lssl.data.batch import Visit
from lssl.datamodules.label_maps import LabelMapDataModule
from lssl.synthetic.label_map_anatomy import STRUCTURES, _cut_spinal_cord, class_names, classes, read_map
from lssl.synthetic.label_map_subject import (
    locate,
)
from lssl.synthetic.phantom_image import residual
from lssl.utils.errors import InputError


def same(first: Visit, second: Visit) -> bool:
    names = ("image", "label", "foreground", "affine")
    return first.age == second.age and all(torch.equal(getattr(first, n), getattr(second, n)) for n in names)


# --- what is made -----------------------------------------------------------------------------------------------------


def test_one_seed_gives_the_same_visits_to_the_bit_in_any_order(maps, data):
    again = make(maps, subjects=9, visits=3, cache=False)
    for index, visit in ((5, 1), (0, 2), (2, 0)):
        read_map.cache_clear()
        assert same(again.read(row(again, index, visit)), data.read(row(data, index, visit)))
    other = make(maps, seed=1)
    assert not torch.equal(other.read(row(other, 0, 0)).image, data.read(row(data, 0, 0)).image)


def test_shapes_types_and_background(data):
    visit = data.read(row(data, 1, 1))
    assert visit.image.shape == (1, 56, 64, 60)
    assert visit.foreground.shape == visit.label.shape == (56, 64, 60)
    assert (visit.image.dtype, visit.label.dtype, visit.foreground.dtype) == (torch.float32, torch.int16, torch.bool)
    assert visit.affine.dtype == torch.float64
    assert visit.image.isfinite().all()
    assert visit.image.min() >= 0
    assert visit.image[0][~visit.foreground].max() == 0
    assert visit.image[0][visit.foreground].quantile(0.999) == pytest.approx(1, abs=0.02)
    assert visit.label.unique().tolist() == list(range(len(data.classes)))
    assert not visit.label[~visit.foreground].any()
    assert 0.3 < visit.foreground.float().mean() < 0.8


def test_labels_are_the_maps_where_each_voxel_lies(maps, data):
    """Voxel by voxel, by the file's own affine: first visit of a first subject, which has the map's own shape."""
    for index in (0, 1):  # the second map is stored from right to left
        file = nib.load(maps / f"sub-{index:02d}_dseg.nii.gz")
        stored, back = np.asarray(file.dataobj), np.linalg.inv(file.affine)
        cerebrum = np.argwhere(np.isin(stored, (2, 3, 41, 42)))
        middle = (file.affine @ [*(cerebrum.min(0) + cerebrum.max(0)) / 2, 1])[:3]
        visit, wrong = data.read(row(data, index, 0)), 0
        matrix = (residual(0, index, 0, SPACING) @ visit.affine).numpy()
        lookup = {n: c for c, sides in enumerate(STRUCTURES.values(), 1) for n in sides[0] + sides[1]}
        voxels = np.random.default_rng(0).integers(0, visit.label.shape, (3000, 3))
        for voxel in voxels:
            place = (back @ [*((matrix @ [*voxel, 1])[:3] + middle), 1])[:3].round().astype(int)
            inside = all(0 <= i < n for i, n in zip(place, stored.shape, strict=True))
            number = int(stored[tuple(place)]) if inside else 0
            wrong += int(visit.label[tuple(voxel)]) != lookup.get(number, 0)
            wrong += bool(visit.foreground[tuple(voxel)]) != (number > 0)
        assert wrong <= 3  # ties of rounding


def test_image_and_labels_agree_in_every_visit(data):
    names = data.classes
    for each in range(0, len(data.table), 2):
        visit = data.read(each)
        mean = {name: visit.image[0][visit.label == label].mean().item() for label, name in enumerate(names)}
        assert mean["white matter"] > mean["cortex"] + 0.06
        assert mean["cortex"] > mean["lateral ventricle"] + 0.08
        shifted = visit.image[0].roll(1, 0)
        spread = [image[visit.label == 2].std().item() for image in (visit.image[0], shifted)]
        assert spread[0] < spread[1]


def test_contrast_differs_by_visit(data):
    for index in (1, 2):
        visits = [data.read(row(data, index, visit)) for visit in range(3)]
        ratios = [(each.image[0][each.label == 1].mean() / each.image[0][each.label == 2].mean()) for each in visits]
        assert max(ratios) - min(ratios) > 0.01


def test_sides(maps):
    data = make(maps, lateral=True)
    assert data.classes == class_names(True)
    assert len(data.classes) == 2 * len(STRUCTURES)  # background, and one structure without sides
    for index in (0, 1):
        label = data.read(row(data, index, 0)).label
        for number, name in enumerate(data.classes):
            if name.startswith("left"):
                left, right = ((label == n).nonzero().double().mean(0) for n in (number, number + 1))
                assert data.classes[number + 1] == name.replace("left", "right")
                assert left[0] < right[0], name
    merged, apart = make(maps).volumes(0, 1), data.volumes(0, 1)
    assert merged[1] == pytest.approx(apart[1] + apart[2])
    assert merged[9] == pytest.approx(apart[17])


def test_further_subjects_of_a_map_have_a_shape_of_their_own(data):
    places = 60 * torch.rand(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 30
    moved = [(locate(data.subject(index), places) - places).norm(dim=1) for index in (0, 4, 5)]
    assert moved[0].max() == 0
    assert min(part.mean() for part in moved[1:]) > 1
    assert max(part.max() for part in moved[1:]) < 20
    assert data.table["map"].iloc[row(data, 4, 0)] == data.table["map"].iloc[row(data, 0, 0)]


def test_the_brainstem_ends_where_the_cerebellum_does():
    label = np.zeros((4, 5, 9), np.int16)
    label[1, 2, :] = 16  # from the bottom of the scan to the top
    label[2, 2, 3:6] = 47
    _cut_spinal_cord(label, np.diag([2.0, 2.0, 2.0, 1.0]))
    assert label[1, 2].tolist() == [500] * 3 + [16] * 6
    assert label[2, 2].tolist() == [0] * 3 + [47] * 3 + [0] * 3


# --- splits and table -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_no_map_is_in_two_splits(maps, seed):
    data = LabelMapDataModule(maps, subjects=17, split=(0.5, 0.25, 0.25), seed=seed)
    data.setup()
    parts = data.table.groupby("map")["split"].unique()
    assert all(len(part) == 1 for part in parts)
    assert sorted(part[0] for part in parts) == ["test", "train", "train", "val"]
    assert data.table["subject"].nunique() == 17
    assert data.table.groupby("subject").size().eq(3).all()
    assert "from 4 label maps" in data.summary


def test_ages_and_times(data):
    assert data.table.groupby("subject")["time"].first().eq(0).all()
    assert (data.table.groupby("subject")["time"].diff().dropna() > 0.9).all()
    assert data.table["age"].between(55, 90).all()
    assert data.read(3).age == data.table["age"].iloc[3]


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_wrong_folders_and_maps_stop_early(tmp_path, maps):
    with pytest.raises(InputError, match=r"The folder .*nowhere does not exist; give root"):
        LabelMapDataModule(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no label maps \(\*\.nii, \*\.nii\.gz\)"):
        LabelMapDataModule(tmp_path)
    file = nib.load(maps / "sub-00_dseg.nii.gz")
    label = np.asarray(file.dataobj)
    whole = {"split": (1.0, 0.0, 0.0)}
    write(tmp_path / "a.nii.gz", label.astype(np.float32) + 0.5, file.affine)
    with pytest.raises(InputError, match=r"a\.nii\.gz holds .* values that are not whole numbers"):
        LabelMapDataModule(tmp_path, **whole).setup()
    write(tmp_path / "a.nii.gz", np.where(np.isin(label, (4, 5, 43, 44)), 24, label), file.affine)
    with pytest.raises(InputError, match=r"has no lateral ventricle \(label 4 or 5 or 43 or 44\)"):
        LabelMapDataModule(tmp_path, **whole).setup()
    write(tmp_path / "a.nii.gz", np.where(label == 507, 5007, label), file.affine)
    with pytest.raises(InputError, match="labels from 0 to 5007"):
        LabelMapDataModule(tmp_path, **whole).setup()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"subjects": 2}, "2 label maps cannot be divided over train, val, test"),
        ({"subjects": 0}, "There are 0 subjects"),
        ({"visits": 0}, "with 0 visits"),
        ({"visits": 6}, "6 visits every 2 years are too many; subjects age for 6 years"),
        ({"spacing": 0.0}, "spacing is 0 mm"),
        ({"size": 4}, "at least 8 voxels"),
    ],
)
def test_wrong_options_stop_early(maps, options, sentence):
    with pytest.raises(InputError, match=sentence):
        LabelMapDataModule(maps, **options)


# --- real maps --------------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no label maps in {REAL}; set LSSL_REAL_DATA")
def test_real_maps_lie_in_the_default_field_of_view():
    data = LabelMapDataModule(REAL)
    data.setup()
    assert data.table["split"].value_counts().tolist() == [33, 6, 6]
    visit = data.read(row(data, 7, 0))
    assert visit.label.unique().tolist() == list(range(10))
    corner = [
        (visit.affine @ torch.tensor([*((length - 1) * end for length in visit.label.shape), 1.0]).double())[:3]
        for end in (0, 1)
    ]
    for path in data.maps:
        anatomy = read_map(path)
        index = (classes(anatomy.numbers, False)[anatomy.code.long()] > 0).nonzero().double()
        places = index @ anatomy.affine[:3, :3].T + anatomy.affine[:3, 3]
        assert (places.amin(0) > corner[0] + 3).all(), path  # mm: misregistration
        assert (places.amax(0) < corner[1] - 3).all(), path


# --- several contrasts ------------------------------------------------------------------------------------------------

BOTH = ["T1", "FLAIR"]


def test_further_contrasts_leave_the_first_as_it_is(maps):
    """Same head and labels; white matter is brighter than grey in one alone; textures have nothing in common."""
    alone, both = make(maps), make(maps, contrasts=BOTH)
    assert (alone.channels(), both.channels()) == (["T1"], BOTH)
    one, two = alone.read(4), both.read(4)
    assert torch.equal(one.image[0], two.image[0])
    assert torch.equal(one.label, two.label)
    assert two.image.shape[0] == 2
    assert two.present is None
    white, grey = (both.classes.index(name) for name in ("white matter", "cortex"))
    for channel, brighter in enumerate((True, False)):
        mean = [two.image[channel][two.label == label].mean() for label in (white, grey)]
        assert (mean[0] > mean[1]) == brighter
    inside = (two.label == white).numpy()
    assert abs(np.corrcoef(two.image[:, torch.from_numpy(inside)].numpy())[0, 1]) < 0.3
    flair = make(maps, contrasts=["FLAIR"]).read(4)
    assert torch.equal(flair.image[0], two.image[1])


def test_a_share_of_the_visits_lacks_one(maps):
    data = make(maps, subjects=40, visits=3, contrasts=BOTH, missing=0.5)
    present = torch.stack([data._present(index, visit) for index in range(40) for visit in range(3)])
    assert present.any(1).all()
    lacking = (~present).float().mean(0)
    assert torch.allclose(lacking, torch.tensor(0.25), atol=0.1)
    row = int((~present[:, 1]).nonzero()[0])
    visit = data.read(int(data.table.index[(data.table["index"] == row // 3) & (data.table["visit"] == row % 3)][0]))
    assert visit.present.tolist() == [True, False]
    assert visit.image[0].any()
    assert not visit.image[1].any()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"contrasts": ["T1", "PD"]}, "contrasts is.*name at least one of T1, T2, FLAIR"),
        ({"contrasts": ["T1", "T1"]}, "and every one once"),
        ({"contrasts": []}, "name at least one"),
        ({"missing": 0.5}, "missing is 0.5.*at least two contrasts"),
        ({"missing": 1.5, "contrasts": BOTH}, "between 0 and 1"),
    ],
)
def test_wrong_contrasts_stop_early(maps, options, sentence: str):
    with pytest.raises(InputError, match=sentence):
        make(maps, **options)
