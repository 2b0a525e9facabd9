"""Views: image and matrix agree, places keep their promises, and unaugmented views are plain slices."""

from __future__ import annotations

import itertools

import pytest
import torch
from some_views import BIG, SIZE, draw, index_map, views

from lssl.utils.errors import InputError
from lssl.views import geometry as geo
from lssl.views.sampler import View, ViewSampler


def corners(view: View) -> torch.Tensor:
    """Source indices ``(B, 8, 3)`` of the corners of the view's box."""
    faces = [(-0.5, n - 0.5) for n in view.size]
    return geo.transform(index_map(view), torch.tensor(list(itertools.product(*faces)), dtype=torch.float64))


def shared_part(first: View, second: View) -> torch.Tensor:
    """Brute-force overlap, counted on a fine grid of points in the second view, over the smaller view's volume."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(4 * n) / 4 - 0.375 for n in second.size], indexing="ij"), -1)
    points = geo.transform(second.affine, grid.flatten(0, 2).double())
    index = geo.transform(torch.linalg.inv(first.affine), points)
    inside = ((index >= -0.5) & (index <= torch.tensor(first.size) - 0.5)).all(-1).double().mean(1)
    one, two = (torch.linalg.det(view.affine[:, :3, :3]).abs() for view in (first, second))
    return inside * two / torch.minimum(one, two)


# --- image and matrix agree -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", ["independent", "shared", "aligned"])
@pytest.mark.parametrize("visits", ["same", "oblique"])
def test_every_voxel_shows_the_place_its_matrix_says(make_batch, geometry: str, visits: str):
    batch = make_batch(4, BIG, image="frame", affine=visits)
    pair = draw(batch, geometry=geometry, flip=(0.5, 0.5, 0.5), rotation=25.0, zoom=(0.7, 1.4))
    for view in pair:
        places = geo.transform(view.affine, geo.lattice(view.size))
        shown = view.image.flatten(2).transpose(1, 2).double()
        inner = geo.contains(geo.transform(index_map(view), geo.lattice(view.size)), BIG)  # zeros mix in beyond
        assert inner.double().mean() > 0.8
        assert (shown - places)[inner].abs().max() < 1e-3  # mm, though a place is up to 50 mm in float32


@pytest.mark.parametrize("geometry", ["independent", "shared", "aligned"])
def test_centred_views_show_one_box_of_the_frame_though_the_visits_moved(make_batch, geometry: str):
    batch = make_batch(3, BIG, image="frame", affine="oblique")
    sampler, _ = views(geometry=geometry)
    first, second = sampler.centred(batch)
    torch.testing.assert_close(first.affine, second.affine)
    torch.testing.assert_close(second.image, first.image, rtol=0, atol=1e-3)


def test_a_visit_moved_by_its_affine_alone_still_corresponds(make_batch):
    batch = make_batch(3, BIG, image="frame", affine="oblique")
    first, second = draw(batch, rotation=20.0)
    points = geo.transform(first.affine, geo.lattice(first.size))
    both = first.contains(points) & second.contains(points)
    inner = [geo.contains(geo.transform(torch.linalg.inv(view.affine), points), view.size) for view in (first, second)]
    sources = [
        geo.contains(geo.transform(torch.linalg.inv(view.source_affine), points), BIG, 1.0) for view in (first, second)
    ]
    keep = both & inner[0] & inner[1] & sources[0] & sources[1]
    assert keep.float().mean() > 0.3
    for view in (first, second):
        assert (geo.sample(view.image, view.affine, points) - points)[keep].abs().max() < 1e-3


@pytest.mark.parametrize("extent", [None, (17, 15, 20)])
def test_shows_is_point_in_both_boxes(make_batch, extent: tuple | None):
    batch = make_batch(2, (20, 20, 20))
    if extent:
        batch.extent[:] = torch.tensor(extent)
    view, _ = draw(batch, foreground=False, size=16)
    points = geo.transform(view.affine, torch.rand(2, 300, 3, dtype=torch.float64) * 24 - 4)
    seen, inv = view.contains(points), torch.linalg.inv
    for b, k in itertools.product(range(2), range(300)):
        inside = True
        for matrix, size, edge in (
            (view.affine[b], (16, 16, 16), 0.5),
            (batch.affines[b, 0], extent or (20, 20, 20), 0),
        ):
            index = (inv(matrix) @ torch.cat([points[b, k], torch.ones(1, dtype=torch.float64)]))[:3].tolist()
            inside &= all(-edge <= x <= n - 1 + edge for x, n in zip(index, size, strict=True))
        assert seen[b, k] == inside
    assert 0 < seen.sum() < seen.numel()


def test_shows_asks_the_foreground_if_told(make_batch):
    batch = make_batch(1, BIG, affine="unit")
    batch.foreground[..., :20] = False
    view, _ = draw(batch, foreground=False, affine_probability=0.0, flip=(0, 0, 0), size=BIG)
    points = torch.rand(1, 200, 3, dtype=torch.float64) * torch.tensor(BIG)
    points = points[:, (points[0, :, 2] - 19.5).abs() > 0.01]
    expected = view.contains(points) & (points[..., 2] > 19.5)
    assert torch.equal(view.contains(points, foreground=True), expected)


def test_labels_are_nearest_and_minus_one_outside(make_batch):
    batch = make_batch(2, (14, 13, 12), labels=True)
    batch.labels[1, 0] = -1  # a visit without labels
    for visit, view in enumerate(draw(batch, rotation=20.0, zoom=(1.3, 1.5), size=12)):
        index = geo.transform(index_map(view), geo.lattice(view.size)).round().long()
        outside = 0
        for b in range(2):
            found = view.label[b, 0].flatten().tolist()
            for value, (i, j, k) in zip(found, index[b].tolist(), strict=True):
                inside = 0 <= i < 14 and 0 <= j < 13 and 0 <= k < 12
                assert value == (batch.labels[b, visit, i, j, k] if inside else -1)
                outside += not inside
        assert outside > 0


def test_foreground_is_the_nearest_voxels(make_batch):
    """Interpolating the mask itself, then cutting at one half, agrees except where the mask is thinner than a voxel."""
    batch = make_batch(2, BIG)
    batch.foreground[:, :, : BIG[0] // 2] = False
    batch.images = batch.foreground.float().unsqueeze(2)
    for view in draw(batch):
        assert ((view.image > 0.5) == (view.foreground > 0.5)).float().mean() > 0.98
        assert set(view.foreground.unique().tolist()) == {0.0, 1.0}


def test_lookup_is_nearest_and_says_what_is_outside():
    volume = torch.arange(24).view(1, 2, 3, 4).short()
    affine = geo.translation(torch.tensor([[10.0, 0.0, 0.0]], dtype=torch.float64))
    points = torch.tensor([[[10.4, 1.6, 2.6], [11.0, 0.0, 0.0], [9.4, 0.0, 0.0], [10.0, 0.0, 3.6]]])
    assert geo.sample_nearest(volume, affine, points, -1).tolist() == [[0 * 12 + 2 * 4 + 3, 12, -1, -1]]


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("visits", ["same", "oblique"])
@pytest.mark.parametrize("overlap", [0.3, 0.7])
def test_views_share_the_part_that_was_asked(make_batch, overlap: float, visits: str):
    parts = torch.cat([shared_part(*draw(make_batch(8, BIG, affine=visits), seed, overlap=overlap)) for seed in (0, 1)])
    assert parts.min() > overlap - 0.005  # what counting points gets wrong
    assert parts.mean() > overlap
    assert parts.min() < 0.98  # and not by showing the same box


def test_no_views_share_less_than_was_asked(make_batch):
    """Of many draws, so that some lie at the border; all that a dense count finds below it is its own error."""
    batch = make_batch(48, BIG, affine="same")
    for overlap in (0.3, 0.5):
        first, second = draw(batch, zoom=(0.7, 1.4), rotation=20.0, overlap=overlap, flip=(0.5, 0.5, 0.5))
        parts = shared_part(first, second)
        assert parts.min() > overlap - 0.003
        assert parts.min() < overlap + 0.15
        sampler, _ = views()
        exact = torch.from_numpy(sampler._shared_part(index_map(second).numpy(), index_map(first).numpy()))
        assert (exact - parts).abs().max() < 0.004


def test_impossible_overlap_falls_back_to_the_same_box(make_batch):
    first, second = draw(make_batch(4, BIG, affine="same"), overlap=1.0, rotation=30.0, zoom=(1.0, 1.0))
    torch.testing.assert_close(first.affine, second.affine)
    moved = draw(make_batch(4, BIG, affine="oblique"), overlap=1.0, rotation=30.0, zoom=(1.0, 1.0))
    torch.testing.assert_close(moved[0].affine, moved[1].affine)
    assert not torch.allclose(index_map(moved[0]), index_map(moved[1]))


def test_views_never_leave_a_source_that_holds_them(make_batch):
    batch = make_batch(16, BIG, affine="same")
    batch.extent[:] = torch.tensor((36, 30, 28))
    for seed in range(4):
        for view in draw(batch, seed, rotation=15.0, zoom=(0.7, 1.3), overlap=0.2):
            reached = corners(view)
            assert reached.min() >= -0.5 - 1e-9
            assert (reached - torch.tensor((36, 30, 28))).max() <= -0.5 + 1e-9


@pytest.mark.parametrize("foreground", [True, False])
def test_centres_lie_on_the_foreground_if_asked(make_batch, foreground: bool):
    batch = make_batch(32, BIG)
    batch.foreground[...] = False
    batch.foreground[:, :, 16:30, 18:, 4:20] = True
    view, _ = draw(batch, foreground=foreground)
    middle = (torch.tensor(SIZE, dtype=torch.float64) - 1) / 2
    centre = geo.transform(index_map(view), middle[None])[:, 0].round().long()
    hit = [batch.foreground[b, 0][tuple(centre[b].tolist())].item() for b in range(32)]
    assert all(hit) == foreground


def test_centres_cover_the_allowed_range(make_batch):
    view, _ = draw(make_batch(200, BIG[::-1]), affine_probability=0.0, flip=(0, 0, 0), foreground=False)
    low = corners(view)[:, 0] + 0.5  # source index of the box's first face
    for axis, (source, side) in enumerate(zip(BIG[::-1], SIZE, strict=True)):
        assert low[:, axis].min() < 0.1 * (source - side)
        assert low[:, axis].max() > 0.9 * (source - side)


@pytest.mark.parametrize("extent", [(28, 24, 20), (27, 23, 19), (21, 21, 15)])
def test_centred_views_are_plain_slices(make_batch, extent: tuple[int, int, int]):
    batch = make_batch(2, (28, 24, 20), affine="same", labels=True)
    batch.extent[:] = torch.tensor(extent)
    batch.foreground[...] = False
    batch.foreground[0, :, 6:15, 5:18, 5:14] = True
    batch.foreground[1, :, 16:20, :3, 10:16] = True
    sampler, _ = views(transforms=None, geometry="independent")
    for visit, view in enumerate(sampler.centred(batch)):
        for b in range(2):
            where = []
            for axis, (n, source) in enumerate(zip(SIZE, extent, strict=True)):
                mass = batch.foreground[b, 0].nonzero()[:, axis].double().mean().item()
                start = min(max(round(mass - (n - 1) / 2), 0), source - n)
                where.append(slice(start, start + n))
            plain = batch.images[(b, visit, slice(None), *where)]
            torch.testing.assert_close(view.image[b], plain, rtol=0, atol=2e-6)
            assert torch.equal(view.label[b, 0], batch.labels[(b, visit, *where)])
            start = torch.tensor([s.start for s in where], dtype=torch.float64)
            torch.testing.assert_close(view.affine[b], batch.affines[b, visit] @ geo.translation(start))


# --- randomness and refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", ["independent", "shared", "aligned"])
def test_one_seed_gives_one_pair_of_views_to_the_bit(make_batch, geometry: str):
    batch = make_batch(3, BIG)
    once, again, other = (draw(batch, seed, geometry=geometry, transforms=None) for seed in (7, 7, 8))
    for a, b, c in zip(once, again, other, strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.affine, b.affine)
        assert not torch.equal(a.affine, c.affine)


def test_samples_of_a_batch_are_drawn_apart(make_batch):
    view, _ = draw(make_batch(4, BIG, affine="unit"))
    assert len({tuple(matrix.flatten().tolist()) for matrix in index_map(view)}) == 4


def test_a_batch_is_cut_as_its_samples_one_by_one(make_batch):
    batch = make_batch(3, BIG, labels=True)
    sampler, generator = views()
    pair = sampler(batch, generator)
    maps = torch.stack([geo.inverse(view.source_affine) @ view.affine for view in pair], 1).numpy()
    for b in range(3):
        one = batch._map(lambda tensor, b=b: tensor[b : b + 1])
        for whole, alone in zip(pair, sampler.resample_views(one, maps[b : b + 1], None), strict=True):
            torch.testing.assert_close(alone.clean, whole.clean[b : b + 1], rtol=0, atol=1e-6)
            assert torch.equal(alone.label, whole.label[b : b + 1])


def test_sources_are_left_as_they_were(make_batch):
    batch = make_batch(2, BIG)
    before = batch.images.clone()
    draw(batch, transforms=None)
    assert torch.equal(batch.images, before)


def test_wrong_settings_are_refused(make_batch):
    with pytest.raises(InputError, match="overlap is a share"):
        ViewSampler(overlap=0.0)
    with pytest.raises(InputError, match="zoom is a range"):
        ViewSampler(zoom=(1.2, 0.8))
    with pytest.raises(InputError, match="does not fit into sources of"):
        draw(make_batch(1, (12, 10, 7)))
