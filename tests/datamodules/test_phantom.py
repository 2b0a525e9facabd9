"""The phantom: reproducible, anatomically ordered, and ageing as it says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import few

from lssl.datamodules import phantom
from lssl.datamodules.phantom import PhantomDataModule
from lssl.synthetic import phantom_ageing as ageing
from lssl.synthetic.phantom_ageing import LONGEST_FAST, RATED, jacobian, volumes
from lssl.synthetic.phantom_anatomy import STRUCTURES
from lssl.synthetic.phantom_image import residual, scan, subject
from lssl.utils.errors import InputError

PAIRED = {2: 41, 3: 42, 4: 43, 7: 46, 8: 47, 10: 49, 11: 50, 12: 51, 13: 52, 17: 53, 18: 54}


@pytest.fixture(autouse=True)
def _drawn_anew(monkeypatch) -> None:
    """Not remembered, as conftest.py does."""
    monkeypatch.setattr(phantom, "scan", scan)


@pytest.fixture(scope="module")
def data() -> PhantomDataModule:
    data = PhantomDataModule(subjects=6, visits=3, size=48, spacing=4.0, single_visit_fraction=0.34)
    data.setup()
    return data


def head_points(count: int = 4000, seed: int = 0) -> torch.Tensor:
    draw = torch.rand(3, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.tensor([[-62.0], [-92.0], [-45.0]]) + draw * torch.tensor([[124.0], [155.0], [115.0]])


def total(volumes: dict[int, float], name: str) -> float:
    return sum(volumes[label] for label in ageing.RATED[name])


def same(first, second) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("image", "label", "affine"))


def test_a_visit_depends_on_seed_subject_and_visit_alone():
    forward = PhantomDataModule(subjects=2, visits=2, size=24, spacing=8.0)
    backward = PhantomDataModule(subjects=5, visits=3, size=24, spacing=8.0, cache=False)
    forward.setup()
    backward.setup()
    subject.cache_clear()
    ageing._course.cache_clear()
    ageing._lattice.cache_clear()
    wanted = {}
    for row in range(len(forward.table)):
        wanted[tuple(forward.table.loc[row, ["index", "visit"]])] = forward.read(row)
    subject.cache_clear()
    ageing._course.cache_clear()
    ageing._lattice.cache_clear()
    for row in reversed(range(len(backward.table))):
        key = tuple(backward.table.loc[row, ["index", "visit"]])
        if key in wanted:
            assert same(backward.read(row), wanted[key])
    other = PhantomDataModule(subjects=2, size=24, spacing=8.0, seed=1)
    assert not torch.equal(other.scan(0, 0).image, forward.scan(0, 0).image)


def test_cached_visits_cannot_be_spoilt(data):
    before = data.read(0)
    kept = before.image.clone()
    before.image.zero_()
    assert torch.equal(data.read(0).image, kept)


def test_table_and_pairs(data):
    assert list(data.table["subject"].value_counts(sort=False)) == [3, 3, 1, 3, 3, 1]
    assert data.table.groupby("subject")["time"].first().eq(0).all()
    assert data.table["age"].between(55, 90).all()
    assert (data.table.groupby("subject")["time"].diff().dropna() > 0.9).all()
    small = PhantomDataModule(subjects=3, size=24, spacing=8.0, split=(1, 0, 0))
    small.setup()
    batch = next(iter(small.train_dataloader()))
    assert batch.images.shape == (2, 2, 1, 24, 24, 24)


@pytest.mark.parametrize(("size", "spacing"), [(64, 3.0), ((40, 56, 48), 4.0), ((96, 80, 20), 2.0)])
def test_shapes_types_and_background(size, spacing):
    data = PhantomDataModule(subjects=2, visits=2, size=size, spacing=spacing)
    data.setup()
    visit = data.read(1)
    shape = (size,) * 3 if isinstance(size, int) else size
    assert visit.image.shape == (1, *shape)
    assert visit.foreground.shape == visit.label.shape == shape
    assert (visit.image.dtype, visit.label.dtype, visit.foreground.dtype) == (torch.float32, torch.int16, torch.bool)
    assert visit.affine.dtype == torch.float64
    assert torch.allclose(visit.affine[:3, :3].diagonal(), torch.tensor(spacing, dtype=torch.float64))
    assert visit.image.isfinite().all()
    assert visit.image[0][~visit.foreground].abs().max() == 0
    assert visit.image[0][visit.foreground].quantile(0.999) == pytest.approx(1, abs=0.02)
    assert visit.image.min() >= 0
    assert not visit.label[~visit.foreground].any()


def test_structures_lie_on_their_sides(data):
    assert len(PAIRED) >= 8
    for index in range(3):
        label = data.scan(index, 0).label
        assert set(label.unique().tolist()) <= {0, *STRUCTURES}
        for left, right in PAIRED.items():
            places = [(label == name).nonzero().double().mean(0) for name in (left, right)]
            assert places[0][0] < places[1][0], STRUCTURES[left]
            assert (places[0] - places[1])[1:].norm() < 3, STRUCTURES[left]


def test_volumes_are_those_of_a_brain(data):
    for index in range(3):
        litres = {label: volume / 1e6 for label, volume in data.volumes(index, 0).items()}
        assert set(litres) == set(STRUCTURES)
        assert 0.35 < litres[3] + litres[42] < 0.65
        assert 0.30 < litres[2] + litres[41] < 0.60
        assert 0.008 < litres[4] + litres[43] < 0.09
        assert 0.003 < litres[17] + litres[53] < 0.010


@pytest.mark.parametrize("index", few(range(3), 1))
def test_volumes_follow_the_rates(index):
    someone = subject(0, index)
    before = ageing.volumes(someone)
    previous = before
    for time in (2.0, 5.0):
        after = ageing.volumes(someone, time)
        for name, sign in (("ventricles", 1), ("hippocampus", -1), ("cortex", -1)):
            assert sign * (total(after, name) - total(previous, name)) > 0
            rate = math.log(total(after, name) / total(before, name)) / time
            assert rate == pytest.approx(someone.rates[name], rel=0.05)
        previous = after
    assert before[16] == pytest.approx(previous[16], rel=0.03)


def test_fast_subjects_follow_their_rates_and_are_like_the_others_else():
    """Ventricles 8 to 10 %, hippocampi -4 to -5 % a year, for six years, without a fold."""
    plain, fast = subject(0, 3), subject(0, 3, True)
    assert plain.age == fast.age
    assert torch.equal(plain.scale, fast.scale)
    assert 0.08 <= fast.rates["ventricles"] <= 0.10
    assert -0.05 <= fast.rates["hippocampus"] <= -0.04
    before, after = volumes(fast), volumes(fast, LONGEST_FAST)
    for name, labels in RATED.items():
        rate = math.log(sum(after[n] for n in labels) / sum(before[n] for n in labels)) / LONGEST_FAST
        assert rate == pytest.approx(fast.rates[name], rel=0.05)
    worst = replace(fast, rates={"ventricles": 0.10, "hippocampus": -0.05, "cortex": -0.015})
    box = [torch.arange(low, high, 4.0).double() for low, high in ((-80, 80), (-110, 80), (-80, 85))]
    points = torch.stack(torch.meshgrid(*box, indexing="ij")).flatten(1)
    assert jacobian(worst, points, LONGEST_FAST).min() > 0.1


def test_every_structure_has_a_declared_rate():
    """Against the volumes two years later: within a tenth, or 0.1 % a year, as rates are those of the first visit."""
    data = PhantomDataModule(subjects=4, visits=2, size=16, spacing=12.0, fast=0.25)
    assert [data.subject(index).rates["ventricles"] > 0.07 for index in range(4)] == [False, False, False, True]
    declared = data.rates(1)
    assert {"ventricles", "hippocampus", "cortex"} <= set(declared)
    before, after = volumes(data.subject(1)), volumes(data.subject(1), 2.0)
    for label in before:
        if label in STRUCTURES:
            found = math.log(after[label] / before[label]) / 2
            assert found == pytest.approx(declared[STRUCTURES[label]], rel=0.1, abs=1e-3), STRUCTURES[label]
    with pytest.raises(InputError, match="too many"):
        PhantomDataModule(subjects=4, visits=4, interval=2.0, fast=0.5)


def test_rates_differ_between_subjects():
    rates = torch.tensor([list(subject(0, index).rates.values()) for index in range(12)])
    assert (rates.std(0) / rates.mean(0).abs() > 0.2).all()
    assert (rates[:, 0] > 0).all()
    assert (rates[:, 1:] < 0).all()


def test_counted_voxels_follow_the_rates():
    someone, voxels = subject(0, 1), {}
    for time in (0.0, 5.0):
        label = scan(0, 1, 0, time, (96, 96, 96), 2.0).label
        voxels[time] = {int(name): (label == name).sum().item() for name in label.unique()}
    for name, tolerance in (("ventricles", 0.1), ("hippocampus", 0.25), ("cortex", 0.25)):
        rate = math.log(total(voxels[5.0], name) / total(voxels[0.0], name)) / 5
        assert rate == pytest.approx(someone.rates[name], rel=tolerance)


def test_labels_move_with_the_deformation():
    points = head_points(20_000)
    for index in range(2):
        someone = subject(0, index)
        before = ageing.labels_at(someone, points)
        after = ageing.labels_at(someone, points + ageing.displacement(someone, points, 5.0), 5.0)
        assert (before == after).double().mean() > 0.9999
        assert (before == ageing.labels_at(someone, points, 5.0)).double().mean() < 0.99  # it is the motion that helps


def test_deformation_is_invertible_for_the_longest_time():
    points = head_points()
    for index in (11, 14):  # those that age fastest, and whose smallest determinant is lowest
        assert ageing.jacobian(subject(0, index), points, ageing.LONGEST).min() > 0.2


@pytest.mark.parametrize("index", range(4))
def test_deformation_is_smooth_and_invertible(index):
    someone, points = subject(0, index), head_points()
    move = ageing.displacement(someone, points, 8.0)
    determinant = ageing.jacobian(someone, points, 8.0)
    assert 0.3 < move.norm(dim=0).max() < 6
    assert determinant.min() > 0.3
    assert determinant.max() < 5
    # Smooth: neighbours 0.5 mm apart move alike, and the displacement grows steadily in time.
    near = ageing.displacement(someone, points + torch.tensor([[0.3], [0.4], [0.0]]), 8.0)
    assert (near - move).norm(dim=0).max() < 0.5 * 0.8
    half = ageing.displacement(someone, points, 4.0)
    assert (move - 2 * half).norm(dim=0).max() < 0.3 * move.norm(dim=0).max()
    # Far outside, in the scalp, nothing moves.
    scalp = torch.tensor([[0.0, 90.0], [-17.0, -17.0], [95.0, 10.0]], dtype=torch.float64)
    assert ageing.displacement(someone, scalp, 8.0).abs().max() < 1e-6


def test_jacobian_agrees_with_differences_of_the_displacement():
    someone, points, step = subject(0, 0), head_points(200), 0.05
    columns = []
    for offset in step * torch.eye(3, dtype=torch.float64):
        ahead, behind = (ageing.displacement(someone, points + sign * offset[:, None], 6.0) for sign in (1, -1))
        columns.append((ahead - behind + 2 * offset[:, None]) / (2 * step))
    expected = torch.linalg.det(torch.stack(columns, 1).permute(2, 0, 1))
    assert torch.allclose(ageing.jacobian(someone, points, 6.0), expected, atol=2e-3)


def test_misregistration_is_below_a_voxel():
    matrices = torch.stack([residual(0, index, visit, 3.0) for index in range(6) for visit in range(3)])
    rotation = matrices[:, :3, :3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3, dtype=torch.float64), atol=1e-12)
    cosine = (rotation.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2
    angle = torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))
    assert angle.max() <= 0.5
    assert angle.mean() > 0.1
    centre = torch.tensor([0.0, -18.0, -3.0, 1.0], dtype=torch.float64)
    shift = (matrices @ centre - centre)[:, :3].norm(dim=1)
    assert shift.max() <= 1.5
    assert shift.mean() > 0.3
    made = scan(0, 0, 1, 2.0, (16, 16, 16), 3.0)
    assert torch.equal(made.residual, residual(0, 0, 1, 3.0))
    assert torch.equal(made.affine[:3, :3], 3 * torch.eye(3, dtype=torch.float64))  # the header knows nothing of it


def test_contrast_is_t1_weighted_in_every_visit(data):
    for row in range(len(data.table)):
        visit = data.read(row)
        image, label = visit.image[0], visit.label
        white, grey, fluid = (
            image[torch.isin(label, torch.tensor(names))].mean() for names in ((2, 41), (3, 42), (4, 43))
        )
        assert white > grey + 0.08
        assert grey > fluid + 0.08


def test_subjects_differ_more_than_visits(data):
    scans = [[data.scan(index, visit) for visit in range(2)] for index in range(3)]

    def alike(first, second) -> float:
        inside = first.head & second.head
        return torch.corrcoef(torch.stack([first.image[inside], second.image[inside]]))[0, 1].item()

    within = [alike(first, second) for first, second in scans]
    between = [alike(scans[a][0], scans[b][0]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert min(within) > max(between) + 0.1
    assert all((first.label == second.label).double().mean() > 0.9 for first, second in scans)


# --- correspondence ---------------------------------------------------------------------------------------------------


def rows(data: PhantomDataModule, *wanted: tuple[int, int]) -> list[int]:
    numbers = list(zip(data.table["index"], data.table["visit"], strict=True))
    return [numbers.index(each) for each in wanted]


def test_locate_undoes_canonical():
    for index, time in ((0, 0.0), (1, 3.0), (2, 7.5)):
        someone, points = subject(0, index), head_points(500)
        torch.testing.assert_close(
            ageing.locate(someone, ageing.canonical(someone, points, time), time), points, rtol=0, atol=1e-5
        )


def test_correspondence_across_visits_is_the_known_deformation(data):
    """First the misregistration of one visit, then ageing from one time to the next, then back through the other's."""
    first, second = rows(data, (0, 1), (0, 2))
    someone, points = subject(data.seed, 0), head_points(300)
    start = torch.linalg.inv(residual(data.seed, 0, 1, data.spacing))
    end = torch.linalg.inv(residual(data.seed, 0, 2, data.spacing))

    def seen(matrix: torch.Tensor, time: float) -> torch.Tensor:
        moved = points + ageing.displacement(someone, points, time)  # of what lies at ``points`` at baseline
        return (matrix @ torch.cat([moved, torch.ones(1, moved.shape[1], dtype=moved.dtype)]))[:3].T

    here, there = seen(start, data.time(0, 1)), seen(end, data.time(0, 2))
    torch.testing.assert_close(data.correspond(here, first, second), there, rtol=0, atol=1e-4)
    torch.testing.assert_close(data.correspond(here, first, first), here, rtol=0, atol=1e-4)
    assert (there - here).norm(dim=1).max() > 0.5


def test_correspondence_across_subjects_returns_and_hits_the_structures(data):
    (first, second) = rows(data, (1, 0), (3, 1))
    one, other = data.read(first), data.read(second)
    misses = []
    for label in (10, 12, 17, 49, 51):
        voxels = (one.label == label).nonzero().double()
        here = voxels @ one.affine[:3, :3].T + one.affine[:3, 3]
        there = data.correspond(here, first, second)
        torch.testing.assert_close(data.correspond(there, second, first), here, rtol=0, atol=1e-4)
        truth = (other.label == label).nonzero().double() @ other.affine[:3, :3].T + other.affine[:3, 3]
        misses.append([(place.mean(0) - truth.mean(0)).norm().item() for place in (there, here)])
    carried, left = torch.tensor(misses).unbind(1)
    assert carried.max() < 1.5  # mm, of voxels of 4 mm
    assert carried.mean() < left.mean() / 2


GROUPS = {"stable": {"ventricles": 0.02}, "fast": {"ventricles": 0.10, "hippocampus": -0.05}}


def test_groups_of_rates_differ_in_nothing_but_declared_rates():
    data = PhantomDataModule(subjects=5, visits=2, size=16, spacing=12.0, interval=4.0, rate_groups=GROUPS)
    data.setup()
    assert data.table["group"].tolist() == (["stable"] * 2 + ["fast"] * 2) * 2 + ["stable"] * 2
    plain, slow, fast = subject(0, 1), data.subject(0), data.subject(1)
    assert (slow.rates["ventricles"], fast.rates["ventricles"], fast.rates["hippocampus"]) == (0.02, 0.10, -0.05)
    assert fast.rates["cortex"] == plain.rates["cortex"]
    assert (fast.age, fast.growth, fast.tissue) == (plain.age, plain.growth, plain.tissue)
    assert torch.equal(fast.scale, plain.scale)
    assert same(data.scan(1, 0), PhantomDataModule(size=16, spacing=12.0).scan(1, 0))  # a first visit shows no group
    before, after = (data.volumes(1, visit) for visit in (0, 1))
    grown = math.log(total(after, "ventricles") / total(before, "ventricles")) / data.time(1, 1)
    assert grown == pytest.approx(0.10, rel=0.05)
    assert "group" not in PhantomDataModule(subjects=2).visit_table()
