"""Cohorts from label maps age as they say: correspondence, rates and volumes, without folds."""

# ruff: noqa: F811

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import few
from scipy.ndimage import map_coordinates
from small_maps import REAL, SPACING, data, maps, row  # noqa: F401

from lssl.datamodules.label_maps import LabelMapDataModule
from lssl.synthetic.label_map_anatomy import AGEING, STRUCTURES, classes
from lssl.synthetic.label_map_cells import Cells, Surface
from lssl.synthetic.label_map_subject import (
    LONGEST,
    LONGEST_FAST,
    RATES,
    MapSubject,
    canonical,
    draw_subject,
    structure_rates,
    volumes,
)
from lssl.synthetic.phantom_image import residual

# --- ageing and correspondence ----------------------------------------------------------------------------------------


def by_hand(data: LabelMapDataModule, index: int, visit: int, points: np.ndarray) -> np.ndarray:
    """Map frame positions that a visit shows at recorded points, formula by formula, with scipy's interpolation."""
    subject, time = data.subject(index), data.time(index, visit)
    rigid, linear = residual(data.seed, index, visit, SPACING).numpy(), subject.linear.numpy()
    vectors, phases, heights = (part.numpy() for part in subject.warp)
    rates = [subject.rates[name] for name in AGEING]
    alpha = np.linalg.inv(subject.anatomy.response.numpy()) @ rates * time
    back = np.linalg.inv(subject.anatomy.affine.numpy())
    fields = subject.anatomy.fields.double().numpy()
    result = []
    for point in points:
        true = (rigid @ [*point, 1])[:3]
        waves = [h * math.sin(v @ true + p) for v, p, h in zip(vectors, phases, heights, strict=True)]
        true = linear @ true + sum(waves, np.zeros(3))
        place = (back @ [*true, 1])[:3, None]
        move = [[map_coordinates(part, place, order=1, mode="nearest")[0] for part in field] for field in fields]
        result.append(true + alpha @ np.array(move))
    return np.array(result)


@pytest.mark.parametrize(("index", "visit"), [(0, 2), (4, 1)])
def test_a_visit_shows_what_lies_there_at_its_time(data, index, visit):
    made, anatomy = data.read(row(data, index, visit)), data.subject(index).anatomy
    voxels = (made.label > 0).nonzero()[::23]
    places = by_hand(data, index, visit, (voxels.double() @ made.affine[:3, :3].T + made.affine[:3, 3]).numpy())
    found = anatomy.index(torch.from_numpy(places))
    nearest = anatomy.numbers[anatomy.code[tuple(found.round().long().T)].long()]
    of_class = classes(anatomy.numbers, False)[anatomy.code[tuple(found.round().long().T)].long()]
    assert (of_class != made.label[tuple(voxels.T)]).sum() <= 2  # ties of rounding
    assert (nearest > 0).all()


def brain_points(data: LabelMapDataModule, index: int, visit: int, number: int) -> torch.Tensor:
    one = data.read(row(data, index, visit))
    voxels = (one.label > 0).nonzero()
    draw = torch.Generator().manual_seed(0)
    voxels = voxels[torch.randint(len(voxels), (number,), generator=draw)].double()
    voxels += torch.rand(number, 3, generator=draw) - 0.5
    return voxels @ one.affine[:3, :3].T + one.affine[:3, 3]


@pytest.mark.parametrize(("first", "second"), [((0, 0), (0, 2)), ((4, 2), (4, 1)), ((0, 1), (4, 2))])
def test_correspondence_by_hand(data, first, second):
    """Two places correspond if they show one place of the map; the third case is of two subjects of one map."""
    here = brain_points(data, *first, 60)
    there = data.correspond(here, row(data, *first), row(data, *second))
    np.testing.assert_allclose(
        by_hand(data, *first, here.numpy()), by_hand(data, *second, there.numpy()), rtol=0, atol=1e-5
    )
    assert (here - there).norm(dim=1).max() > 0.3
    back = data.correspond(there, row(data, *second), row(data, *first))
    torch.testing.assert_close(back, here, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("first", "second"), [((4, 0), (0, 2)), ((1, 2), (5, 1))])
def test_labels_follow_the_correspondence(data, first, second):
    one, other = data.read(row(data, *first)), data.read(row(data, *second))
    voxels = (one.label > 0).nonzero()
    here = voxels.double() @ one.affine[:3, :3].T + one.affine[:3, 3]

    def agree(there: torch.Tensor) -> float:
        index = ((there - other.affine[:3, 3]) @ other.affine[:3, :3].inverse().T).round().long()
        inside = ((index >= 0) & (index < torch.tensor(other.label.shape))).all(1)
        found = other.label[tuple(index[inside].T)]
        return (found == one.label[tuple(voxels[inside].T)]).double().mean().item()

    carried = agree(data.correspond(here, row(data, *first), row(data, *second)))
    assert carried > 0.8  # two roundings to the nearest voxel are left, in thin structures
    assert carried > agree(here) + 0.03


def test_of_different_maps_nothing_corresponds(data):
    assert data.correspond(torch.zeros(3, 3), row(data, 0, 0), row(data, 1, 0)).isnan().all()


#: Yearly change of healthy people and in Alzheimer's disease, %: what the literature reports, widely.
RANGES = {
    "lateral ventricle": ((1.5, 6.5), (8, 10)),
    "cortex": ((-1.1, -0.3), (-1.5, -1.1)),
    "white matter": ((-1.3, 0.0), (-2.0, 0.0)),
    "thalamus": ((-0.8, -0.2), (-1.2, -0.6)),
    "caudate": ((-0.8, -0.2), (-1.0, -0.5)),
    "lentiform": ((-0.8, -0.2), (-1.0, -0.5)),
    "hippocampus and amygdala": ((-2.0, -0.5), (-5, -4)),
    "cerebellum": ((-0.3, 0.0), (-0.5, 0.0)),
    "brainstem": ((-0.5, 0.0), (-0.8, 0.0)),
}


def test_every_structure_has_a_rate_in_the_range_of_the_literature(data):
    for index in range(6):
        subject = data.subject(index)
        fast = draw_subject(data.maps[index % 4], data.seed, index, index >= 4, fast=True)
        for number, each in enumerate((subject, fast)):
            declared = structure_rates(each)
            assert set(declared) == set(STRUCTURES) == set(RANGES)
            for name, rate in declared.items():
                low, high = RANGES[name][number]
                assert low - 1e-9 <= 100 * rate <= high + 1e-9, (name, number)
        assert torch.equal(subject.linear, fast.linear)
        assert subject.age == fast.age
    rates = torch.tensor([list(data.subject(each).rates.values()) for each in range(6)])
    assert (rates.std(0) / rates.mean(0).abs() > 0.1).all()


def test_effects_against_moved_surfaces(data):
    """Gauss's theorem on the voxels, and the volume that a moved surface encloses: within 1 % of the largest."""
    anatomy = data.subject(0).anatomy
    little = 0.01 * torch.eye(len(AGEING), dtype=torch.float64)
    for name in ("hippocampus and amygdala", "caudate", "brainstem"):
        left, right = STRUCTURES[name]
        mask = torch.isin(anatomy.numbers, torch.tensor(left + right))[anatomy.code.long()]
        surface = Surface(mask, anatomy.affine)
        before = surface.volume(surface.corners)
        moved = [surface.volume(2 * surface.corners - anatomy.pull(surface.corners, step)) for step in little]
        found = torch.stack([(after / before).log() / 0.01 for after in moved])
        declared = anatomy.effects[list(STRUCTURES).index(name)]
        torch.testing.assert_close(declared, found, rtol=0, atol=0.01 * float(found.abs().max()))


@pytest.mark.parametrize("fast", few([True, False], 1))
def test_volumes_change_as_the_rates_say(data, fast):
    """Of all structures, in a bent subject, over two years, or one if it is fast.

    Rates are those of the first moment; the second order changes them by less than a tenth. Neighbours' fields do the
    rest: their effect on a structure depends on shape, the bent one included, which for ordinary subjects is below
    0.05 % a year. A fast ventricle (8.6 % a year) changes its own shape so much that the caudate beside it loses 0.17 %
    a year more than at first, 2 % of what the ventricle gains.
    """
    subject, time = draw_subject(data.maps[0], data.seed, 4, True, fast), 1.0 if fast else 2.0
    before, after = (volumes(subject, at, False) for at in (0.0, time))
    for label, (name, rate) in enumerate(structure_rates(subject).items(), 1):
        found = math.log(after[label] / before[label]) / time
        assert found == pytest.approx(rate, rel=0.1, abs=2e-3 if fast else 5e-4), name


def test_the_cortex_is_thinned_from_outside(data):
    """Its field points out of the brain, and away from its surface there is little of it."""
    anatomy = data.subject(0).anatomy
    numbers, field = anatomy.numbers[anatomy.code.long()], anatomy.fields[1].double()
    length = field.norm(dim=0)
    cortex, white, head = (torch.isin(numbers, torch.tensor(n)) for n in ((3, 42), (2, 41), (507,)))
    assert length[cortex].mean() > 3 * length[white].mean()
    assert length[head].mean() < 0.02
    index = cortex.nonzero().double()
    outward = (index - index.mean(0)) * (field[:, cortex].T @ anatomy.affine[:3, :3].inverse().T)
    assert (outward.sum(1)[length[cortex] > 0.3] > 0).double().mean() > 0.8


def test_volumes_by_counting_a_fine_lattice(data):
    """Random points of what the subject shows at either time; the map's nearest voxel says the class."""
    subject = data.subject(4)
    box = [torch.arange(-84, 84, 2.5).double() for _ in range(3)]
    points = torch.stack(torch.meshgrid(*box, indexing="ij"), -1).flatten(0, 2)
    points += (
        torch.rand(points.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2.5
    )  # no lattice, no beats
    counted = []
    for time in (0.0, 5.0):
        index = subject.anatomy.index(canonical(subject, points, time)).round().long()
        inside = ((index >= 0) & (index < torch.tensor(subject.anatomy.code.shape))).all(1)
        number = subject.anatomy.numbers[subject.anatomy.code.long()][tuple(index[inside].T)]
        counted.append([torch.isin(number, torch.tensor(n)).sum() * 2.5**3 for n in ((4, 5, 43, 44), (3, 42))])
    before, after = torch.tensor(counted)
    data.time = lambda index, visit: 5.0 * visit  # type: ignore[method-assign]
    try:
        true = torch.tensor([[data.volumes(4, visit)[label] for label in (3, 1)] for visit in (0, 1)])
    finally:
        del data.time
    torch.testing.assert_close(torch.stack([before, after]), true, rtol=0.02, atol=0)
    torch.testing.assert_close((after / before).log(), (true[1] / true[0]).log(), rtol=0.15, atol=0)


def worst(subject: MapSubject, fast: bool) -> MapSubject:
    """Of the largest rates."""
    return replace(subject, rates={name: sum(law[fast]) for name, law in RATES.items()})


def smallest_cell(subject: MapSubject, time: float) -> float:
    """The smallest volume, of 1, that a voxel of the brain is fetched from: below 0 where the deformation folds."""
    anatomy, rates = subject.anatomy, torch.tensor([subject.rates[n] for n in AGEING], dtype=torch.float64)
    brain = (anatomy.numbers > 0) & (anatomy.numbers < 500)
    cells = Cells(brain[anatomy.code.long()], anatomy.affine)
    fetched = cells.volumes(anatomy.pull(cells.corners, torch.linalg.solve(anatomy.response, rates * time)))
    return float(fetched.min() / torch.linalg.det(anatomy.affine[:3, :3]).abs())


def test_nothing_folds_for_the_longest_time(data):
    for index in range(4):
        assert smallest_cell(worst(data.subject(index), False), LONGEST) > 0.05
        assert smallest_cell(worst(data.subject(index), True), LONGEST_FAST) > 0.05


def test_cells_enclose_what_they_should():
    """A map with a known determinant, 1 - 0.12 x y, on a block of cells with oblique, left-handed axes."""
    affine = torch.tensor([[-0.1, 0, 0.02, 0.5], [0, 0.1, 0, 0], [0.01, 0, 0.1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    mask = torch.zeros(12, 9, 8, dtype=torch.bool)
    mask[1:9, 2:, :5] = True
    mask[3, 4, 2] = False
    cells = Cells(mask, affine)
    assert len(cells.corners) == 17 * 15 * 11 - 1  # halves; the middle of the missing voxel is no corner
    voxel = torch.linalg.det(affine[:3, :3]).abs()
    torch.testing.assert_close(cells.volumes(cells.corners), voxel.expand(int(mask.sum())))
    x, y, z = cells.corners.T
    moved = torch.stack([x + 0.3 * y * z, y, z + 0.2 * x**2], 1)
    centre = mask.nonzero().double() @ affine[:3, :3].T + affine[:3, 3]
    torch.testing.assert_close(
        cells.volumes(moved), voxel * (1 - 0.12 * centre[:, 0] * centre[:, 1]), rtol=3e-4, atol=0
    )


def test_a_surface_encloses_its_cells():
    """Of a ragged mask with holes, on oblique axes of either handedness, bent at random: to rounding."""
    draw = torch.Generator().manual_seed(0)
    mask = torch.zeros(9, 8, 7, dtype=torch.bool)
    mask[2:7, 1:, :6] = torch.rand(5, 7, 6, generator=draw) < 0.6
    for side in (1.0, -1.0):
        affine = torch.tensor([[side, 0.1, 0, 5], [0, 1.2, 0, -3], [0.2, 0, 0.9, 40], [0, 0, 0, 1]]).double()
        cells, surface = Cells(mask, affine), Surface(mask, affine)
        assert surface.volume(surface.corners).allclose(mask.sum() * torch.linalg.det(affine).abs(), rtol=1e-10)
        bent = [part + 0.1 * (part.roll(1, 1) * 3).sin() for part in (cells.corners, surface.corners)]
        assert surface.volume(bent[1]).allclose(cells.volumes(bent[0]).sum(), rtol=1e-10)


# --- real maps --------------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.slow  # test_nothing_folds_for_the_longest_time looks at drawn maps
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no label maps in {REAL}; set LSSL_REAL_DATA")
def test_real_maps_do_not_fold():
    data, index = LabelMapDataModule(REAL), 3  # the one of fifteen that is deformed most
    assert smallest_cell(worst(data.subject(index), False), LONGEST) > 0.05
    assert smallest_cell(worst(data.subject(index), True), LONGEST_FAST) > 0.05
