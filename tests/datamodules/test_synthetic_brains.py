"""The endless stream: known in its geometry, and faulty as real scans are."""

# ruff: noqa: F811

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import few
from small_anatomy import anatomy, equal, maps, seeded, stream_of  # noqa: F401

from lssl.synthetic import stream_scanner
from lssl.synthetic.label_map_anatomy import AGEING, STRUCTURES
from lssl.synthetic.label_map_image import CONTRASTS, TISSUES
from lssl.synthetic.splines import INJECTIVE, basis, evaluate
from lssl.synthetic.stream_anatomy import map_anatomy, shapes_anatomy
from lssl.synthetic.stream_contrast import draw_contrast, vary
from lssl.synthetic.stream_course import draw_course

CLASS = {name: number for number, name in enumerate(STRUCTURES, 1)}


# --- deformations -----------------------------------------------------------------------------------------------------


def test_a_spline_is_the_sum_of_its_nodes():
    coefficients = torch.randn(1, 6, 6, 6, generator=seeded(0), dtype=torch.float64)
    places = torch.rand(3, 2, generator=seeded(1), dtype=torch.float64) * 3 + 1
    found = evaluate(coefficients, [basis(axis, 6) for axis in places])

    def beta(t: float) -> float:  # the fourfold box, from its definition by divided differences
        return sum((-1) ** k * w * max(t + 2 - k, 0) ** 3 for k, w in enumerate((1, 4, 6, 4, 1))) / 6

    for i, j, k in itertools.product(range(2), repeat=3):
        x, y, z = places[0, i], places[1, j], places[2, k]
        wanted = sum(
            coefficients[:, a, b, c] * beta(float(x) - a) * beta(float(y) - b) * beta(float(z) - c)
            for a, b, c in itertools.product(range(6), repeat=3)
        )
        torch.testing.assert_close(found[:, i, j, k], wanted)


@pytest.mark.parametrize("seed", few(range(5), 2))
def test_within_the_bound_nothing_folds(seed):
    """Random signs at the bound, in nodes of distance 1: every cell of a fine grid keeps a positive volume."""
    sign = torch.randint(0, 2, (3, 7, 7, 7), generator=seeded(seed), dtype=torch.float64) * 2 - 1
    places = torch.linspace(1, 5, 41, dtype=torch.float64)
    moved = evaluate(INJECTIVE * sign, [basis(places, 7)] * 3)
    moved = moved + torch.stack(torch.meshgrid(places, places, places, indexing="ij"))
    slopes = torch.stack([moved.diff(dim=axis)[:, :40, :40, :40] for axis in (1, 2, 3)])
    assert torch.linalg.det(slopes.permute(2, 3, 4, 0, 1)).min() > 0


@pytest.mark.parametrize("seed", few(range(12), 3))
def test_heads_do_not_fold_at_either_visit(anatomy, seed):
    course = draw_course(anatomy, seeded(seed))
    axes = [torch.arange(-70.0, 70.0, 4.0)] * 3
    for visit in range(2):
        place = course.positions(visit, axes).double()
        slopes = torch.stack([place.diff(dim=axis)[:34, :34, :34] for axis in range(3)], -2)
        assert (torch.linalg.det(slopes) * torch.linalg.det(course.linear).sign()).min() > 0


def test_positions_on_a_grid_are_those_of_single_points(anatomy):
    """The grid goes through matrix products, single points through the 64 nodes around them."""
    course = draw_course(anatomy, seeded(3))
    axes = [torch.tensor([-41.0, 3.5, 20.0]), torch.tensor([-60.0, 0.25]), torch.tensor([-7.0, 33.0, 50.0])]
    points = torch.cartesian_prod(*axes)
    for visit in range(2):
        grid = course.positions(visit, axes).flatten(0, 2)
        torch.testing.assert_close(grid.double(), course.to_map(visit, points), atol=1e-3, rtol=0)


def test_the_grid_of_a_visit_finds_its_voxels_in_the_map(anatomy):
    """Read off an image of the map's own coordinates, at the nodes, where nothing is interpolated."""
    course, corner = draw_course(anatomy, seeded(4)), torch.tensor([-40.0, -50.0, -30.0], dtype=torch.float64)
    grid = course.sampling_grid(1, corner, (9, 9, 9), 4.0)
    index = torch.stack(torch.meshgrid(*[torch.arange(n) for n in anatomy.code.shape], indexing="ij")).float()
    seen = F.grid_sample(index[None], grid, align_corners=True)[0]
    for voxel in ((0, 0, 0), (8, 2, 5), (3, 7, 8)):
        point = corner + 4.0 * torch.tensor(voxel)
        wanted = anatomy.index(course.to_map(1, point[None]))[0]
        torch.testing.assert_close(seen[(slice(None), *voxel)].double(), wanted, atol=5e-3, rtol=0)


def test_tissue_is_found_again_where_correspondence_says(anatomy):
    """Labels at corresponding points agree, better than one voxel aside and better than without correspondence."""
    stream = stream_of(anatomy, size=(64, 64, 60), spacing=2.0)
    agree = {"true": 0.0, "aside": 0.0, "same place": 0.0}
    for number in range(4):
        first, second = stream.visits(number)
        index = torch.randint(8, 52, (3000, 3), generator=seeded(number)).double()
        points = index @ first.affine[:3, :3].T + first.affine[:3, 3]
        own = first.label[tuple(index.long().T)]
        there = stream.correspond(number, points, 0, 1)
        back = stream.correspond(number, there, 1, 0)
        torch.testing.assert_close(back, points, atol=1e-4, rtol=0)
        aside = there + torch.tensor([2.0, 0, 0])
        for name, place in (("true", there), ("aside", aside), ("same place", points)):
            inverse = torch.linalg.inv(second.affine)
            voxel = (place @ inverse[:3, :3].T + inverse[:3, 3]).round().long().clamp_min(0)
            voxel = voxel.minimum(torch.tensor(second.label.shape) - 1)
            agree[name] += (second.label[tuple(voxel.T)] == own).float().mean().item() / 4
    assert agree["true"] > 0.9
    assert agree["true"] > max(agree["aside"], agree["same place"]) + 0.02


def test_a_coarse_field_lies_where_the_fine_one_did(maps):
    """A displacement that grows linearly is the same, read from the coarse field: not half a voxel aside."""
    known = map_anatomy(maps / "sub-01_dseg.nii.gz")
    shape = known.code.shape
    index = torch.stack(torch.meshgrid(*[torch.arange(n) for n in shape], indexing="ij")).float()
    ramp = dataclasses.replace(known, fields=F.avg_pool3d(index, 2, ceil_mode=False)[None], response=torch.eye(1))
    inner = torch.tensor(shape) // 2 + torch.tensor([[0, 0, 0], [3, -4, 5], [-6, 2, 1]])
    points = inner.float() @ known.affine[:3, :3].T + known.affine[:3, 3]
    moved = ramp.pull(points, torch.ones(1)) - points
    torch.testing.assert_close(moved, inner.float(), atol=1e-3, rtol=0)


def test_most_subjects_shrink_around_growing_ventricles(anatomy):
    """Ageing is the rule and growth the exception: one in five has the opposite sign."""
    axis = list(AGEING).index("lateral ventricle")
    effects = []
    for number in range(200):
        course = draw_course(anatomy, seeded(number))
        change = anatomy.response @ (course.amplitudes[1] - course.amplitudes[0])
        effects.append(bool(change[axis] > 0))
    assert 0.7 < np.mean(effects) < 0.9


def test_structures_change_at_the_rates_that_were_drawn(anatomy):
    """The sum over voxels of both visits' labels, of subjects whose ventricles grow fastest."""
    stream, structure = stream_of(anatomy, size=(88, 104, 88), spacing=2.0), "lateral ventricle"
    found, wanted = [], []
    for number in range(40):
        course = stream.draw(number).course
        volume = anatomy.response @ (course.amplitudes[1] - course.amplitudes[0])
        if volume[list(AGEING).index(structure)] < 0.15:
            continue
        wanted.append(float(volume[list(AGEING).index(structure)]))
        corner = -torch.tensor([87.0, 103.0, 105.0], dtype=torch.float64)
        counts = []
        for visit in range(2):
            grid = course.sampling_grid(visit, corner, (88, 104, 88), 2.0)
            code = F.grid_sample(anatomy.code[None, None].float(), grid, mode="nearest", align_corners=True).long()
            counts.append((anatomy.classes(False)[code] == CLASS[structure]).sum().item())
        found.append(np.log(counts[1] / counts[0]))
        if len(found) == 2:
            break
    assert len(found) == 2
    np.testing.assert_allclose(found, wanted, rtol=0.25)


def test_boxes_anywhere_reach_every_end_of_the_head_and_do_not_leave_it(anatomy):
    stream = dataclasses.replace(stream_of(anatomy, size=(8, 8, 8)), anywhere=1.0)
    lowest, highest = [], []
    for number in range(60):
        drawn = stream.draw(number)
        if drawn.look.stripped != "no":
            continue
        corners = anatomy.corners.double() @ torch.linalg.inv(drawn.course.linear).T
        low, high = corners.amin(0), corners.amax(0)
        box = drawn.corners[0], drawn.corners[0] + 7 * 4.0
        lowest.append((box[0] - low) / (high - low))
        highest.append((box[1] - low) / (high - low))
    lowest, highest = torch.stack(lowest), torch.stack(highest)
    assert lowest.min() >= -1e-6
    assert highest.max() <= 1 + 1e-6
    assert (lowest.amin(0) < 0.1).all()
    assert (highest.amax(0) > 0.9).all()


def test_a_box_without_any_brain_is_black_if_the_head_has_no_skull(anatomy, monkeypatch):
    """The brightest tissue of nothing was asked for, which ended a training after 800 steps."""
    stream = stream_of(anatomy, size=(8, 8, 8))
    drawn = next(drawn for number in range(60) if (drawn := stream.draw(number)).look.stripped != "no")
    away = dataclasses.replace(drawn, corners=drawn.corners + 500)
    monkeypatch.setattr(type(stream), "draw", lambda self, number: away)
    for visit in stream.visits(0):
        assert not visit.image.any()
        assert visit.foreground.any()


def test_corners_hold_all_that_is_no_air(anatomy):
    matrix = anatomy.affine.double()
    places = anatomy.code.nonzero().double() @ matrix[:3, :3].T + matrix[:3, 3]
    assert torch.allclose(anatomy.corners.amin(0), places.amin(0), atol=1e-3)
    assert torch.allclose(anatomy.corners.amax(0), places.amax(0), atol=1e-3)


def test_without_change_both_visits_show_the_same_anatomy(anatomy):
    drawn = stream_of(anatomy, change=0).draw(7).course
    assert torch.equal(drawn.amplitudes[0], drawn.amplitudes[1])
    assert torch.equal(drawn.coefficients[0], drawn.coefficients[1])
    shapes = draw_course(shapes_anatomy(seeded(1)), seeded(2), change=0)
    assert torch.equal(shapes.coefficients[0], shapes.coefficients[1])


# --- images -----------------------------------------------------------------------------------------------------------


def test_one_number_makes_one_pair(anatomy):
    stream = stream_of(anatomy, lesions=0.5)
    for first, second in zip(stream.visits(5), stream.visits(5), strict=True):
        assert equal(first, second)
    assert not equal(stream.visits(5)[0], stream.visits(6)[0])
    assert not torch.equal(stream.visits(5)[0].image, stream.visits(5)[1].image)


def test_a_visit_made_alone_is_that_of_the_pair(anatomy):
    stream = stream_of(anatomy, lesions=1.0)
    for visit, made in enumerate(stream.visits(5)):
        (alone,) = stream.visits(5, [visit])
        assert equal(alone, made)
        assert torch.equal(alone.label, made.label)
        assert alone.time == made.time


def test_images_are_scaled_finite_and_dark_outside(anatomy):
    for number in range(30):  # enough for every fault to occur
        for visit in stream_of(anatomy, lesions=0.5).visits(number):
            assert torch.isfinite(visit.image).all()
            assert visit.image.min() >= 0
            assert visit.image.max() <= 2
            assert 0.8 < visit.image[0][visit.foreground].quantile(0.999) < 1.3
            assert set(visit.label.unique().tolist()) <= set(range(10))


@pytest.mark.parametrize("family", sorted(CONTRASTS))
def test_families_keep_the_order_of_fluid_grey_and_white_matter(family, monkeypatch):
    monkeypatch.setattr("lssl.synthetic.stream_contrast._SHARES", {family: 1.0})
    for seed in range(50):
        table, _ = draw_contrast(seeded(seed))
        fluid, cortex, white = table[4], table[3], table[2]
        order = {"T1": (fluid, cortex, white), "T2": (white, cortex, fluid), "FLAIR": (fluid, white, cortex)}[family]
        assert order[0] < order[1] < order[2]


def test_both_sides_of_the_brain_are_alike():
    for seed in range(20):
        table, _ = vary(draw_contrast(seeded(seed)), 0.1, seeded(seed + 100))
        for _, names in TISSUES:
            assert len(set(table[list(names)].tolist())) == 1


def test_slices_average_and_keep_what_is_constant():
    matrix = stream_scanner._slices(30, 3.0, 0.4)
    inner = slice(4, 26)  # whole slices
    torch.testing.assert_close(matrix.sum(1)[inner], torch.ones(22), atol=1e-5, rtol=0)
    ramp = torch.arange(30.0)
    torch.testing.assert_close((matrix @ ramp)[inner], ramp[inner], atol=1e-4, rtol=0)  # no shift by half a slice
    assert (matrix @ torch.eye(30)[:, 15]).max() < 0.4  # a voxel's light is spread over its slice


def test_lesions_lie_in_white_matter_and_change_with_time(anatomy):
    from lssl.synthetic.stream import _lesions

    number = anatomy.numbers[anatomy.code.long()]
    white = torch.isin(number, torch.tensor([2, 41]))
    changed = 0
    for seed in range(10):
        found = _lesions(anatomy, True, 1.0, seeded(seed))
        assert found.any()
        assert not (found & ~white).any()
        changed += not torch.equal(found[0], found[1])
        still = _lesions(anatomy, True, 0.0, seeded(seed))
        assert torch.equal(still[0], still[1])
    assert changed >= 8
    assert not _lesions(anatomy, False, 1.0, seeded(0)).any()


def test_stripped_heads_show_the_brain_alone(anatomy):
    stream = stream_of(anatomy)
    stripped = [number for number in range(40) if stream.draw(number).look.stripped != "no"]
    whole = [number for number in range(40) if number not in stripped]
    assert 8 < len(stripped) < 24
    share = [
        float(np.mean([stream.visits(number)[0].foreground.float().mean() for number in part[:5]]))
        for part in (stripped, whole)
    ]
    assert share[0] < 0.8 * share[1]
    visit = stream.visits(stripped[0])[0]
    assert (visit.image[0][~visit.foreground] == 0).all()
