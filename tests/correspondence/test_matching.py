"""Matchers on planted correspondences: the values of these images are places of the anatomy, so the truth is known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.correspondence.matchers import (
    EmbeddingMatcher,
    FieldMatcher,
    FrameMatcher,
    descriptors,
    full_view,
    select_match,
)
from lssl.networks.feature_geometry import Tap
from lssl.utils.errors import InputError
from lssl.views import geometry as geo
from lssl.views.sampler import ViewSampler

SIZE = (28, 24, 20)


class Planted(nn.Module):
    """Embeds the place that each voxel's three channels name, by waves of random direction, with noise."""

    def __init__(self, noise: float = 0.0, levels: int = 2) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.noise, self.draw = noise, draw
        self.taps = {
            name: Tap("", 128, (stride,) * 3, ((stride - 1) / 2,) * 3)
            for name, stride in (("fine", 2), ("coarse", 4))[:levels]
        }
        self.backbone = SimpleNamespace(taps=self.taps)
        self.waves = {name: torch.randn(128, 3, generator=draw) for name in self.taps}
        self.phases = {name: 2 * math.pi * torch.rand(128, generator=draw) for name in self.taps}

    @torch.autocast("cpu", enabled=False)
    def anatomical_maps(self, image: Tensor) -> list[tuple[Tensor, Tap]]:
        maps = []
        for (name, tap), length in zip(self.taps.items(), (12.0, 30.0), strict=False):
            place = F.avg_pool3d(image, tap.stride)
            wave = torch.einsum("kc,bcdhw->bkdhw", self.waves[name] / length, place)
            value = (wave + self.phases[name][:, None, None, None]).cos()
            value = value + self.noise * torch.randn(value.shape, generator=self.draw)
            maps.append((F.normalize(value, dim=1), tap))
        return maps


def inner(view, count: int = 40, margin: float = 4.0, seed: int = 0) -> Tensor:
    """Places ``(B, count, 3)`` at least some voxels inside each view."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.tensor(view.size)
    index = margin + torch.rand(len(view.image), count, 3, generator=draw, dtype=torch.float64) * (
        size - 1 - 2 * margin
    )
    return geo.transform(view.affine, index)


def distance(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).norm(dim=-1)


@pytest.fixture
def batch(make_batch):
    """Oblique, anisotropic (1.1 × 0.9 × 1.3 mm), the second visit a little displaced."""
    return make_batch(2, SIZE, image="frame")


def views(batch, generator, **settings):
    settings = {"transforms": [], "affine_probability": 1.0, "zoom": (0.9, 1.1), "rotation": 20.0, **settings}
    sampler = ViewSampler((24, 20, 16), **{"flip": (0.5, 0.5, 0.5), "flip_together": False, "overlap": 0.5, **settings})
    return sampler(batch, generator)


# --- frame ------------------------------------------------------------------------------------------------------------


def test_frame_is_the_identity_where_the_other_view_shows_the_point(batch, generator):
    first, second = views(batch, generator)
    points = inner(first, 200, 0.0)
    places, score = FrameMatcher().match(points, first, second)
    assert torch.equal(places, points)
    index = geo.transform(torch.linalg.inv(second.affine), points)
    inside = ((index > -0.5) & (index < torch.tensor(second.size) - 0.5)).all(-1)
    inner_source = geo.transform(torch.linalg.inv(second.source_affine), points)
    inside &= ((inner_source >= 0) & (inner_source <= torch.tensor(SIZE) - 1)).all(-1)
    assert torch.equal(score.bool(), inside)
    assert 0 < score.mean() < 1


# --- embedding --------------------------------------------------------------------------------------------------------


def test_a_field_carries_one_frame_to_the_other_and_back(batch):
    first, second = full_view(batch, 0), full_view(batch, 1)
    points = inner(first)
    field = torch.zeros(len(points), 3, *first.size, dtype=torch.float64)
    field[:, 0], field[:, 2] = 3.0, -2.0  # mm along the axes of the frame, not of the grid
    forth = FieldMatcher(field, first.affine)
    places, score = forth.match(points, first, second)
    moved = points + torch.tensor([3.0, 0.0, -2.0])
    torch.testing.assert_close(places, moved, rtol=0, atol=1e-9)
    assert torch.equal(score > 0, second.contains(moved))
    back, _ = FieldMatcher(field, first.affine, backward=True).match(moved, second, first)
    torch.testing.assert_close(back, points, rtol=0, atol=1e-9)


def test_match_of_itself_is_the_identity(batch):
    view = full_view(batch, 0)
    matcher = EmbeddingMatcher(Planted())
    lattice = geo.lattice((10, 8, 6))[None].expand(2, -1, -1) + 2
    nodes = geo.transform(geo.feature_affine(view.affine, (2, 2, 2), (0.5, 0.5, 0.5)), lattice)
    places, score = matcher.match(nodes, view, view)
    assert distance(places, nodes).max() < 1e-6
    torch.testing.assert_close(score, torch.ones_like(score), rtol=0, atol=1e-5)
    points = inner(view)  # between the lattice's nodes: a quarter of a half step remains after three rounds
    places, _ = EmbeddingMatcher(Planted(), rounds=3).match(points, view, view)
    assert distance(places, points).median() < 0.4


def test_flips_rotations_and_anisotropic_voxels_come_back_in_mm(batch, generator):
    matcher = EmbeddingMatcher(Planted(), rounds=3)
    mirrored = 0
    for _ in range(4):
        first, second = views(batch, generator)
        mirrored += int((torch.det(first.affine[:, :3, :3]) * torch.det(second.affine[:, :3, :3]) < 0).sum())
        points = inner(first, 60)
        shown = second.contains(points) & geo.contains(
            geo.transform(geo.inverse(second.affine), points), second.size, 3
        )
        places, score = matcher.match(points, first, second)
        assert distance(places, points)[shown].median() < 0.5
        assert (distance(places, points)[shown] < 2.5).all()
        assert (score[shown] > 0.8).all()
        back, _ = matcher.match(places, second, first)
        assert distance(back, points)[shown].median() < 0.7
    assert mirrored > 0


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_planted_correspondence_between_subjects_of_different_frames(batch, noise):
    """The second visit's anatomy lies elsewhere by a known affine, about another origin."""
    angles = torch.tensor([[0.3, -0.2, 0.4], [-0.1, 0.5, 0.2]], dtype=torch.float64)
    moved = geo.rotation(angles) @ geo.scaling(torch.tensor([[0.9, 1.1, 1.0], [1.05, 0.95, 1.1]], dtype=torch.float64))
    first, second = full_view(batch, 0), full_view(batch, 1)
    centre = geo.transform(second.affine, (torch.tensor(SIZE).double()[None, None] - 1) / 2)[:, 0]
    offset = torch.tensor([[200.0, -80.0, 30.0]], dtype=torch.float64)
    second.affine = geo.translation(offset) @ geo.about(moved, centre) @ second.affine
    second.source_affine = second.affine  # its image still names places of the first frame
    points = inner(first, 80, 6.0)
    truth = geo.transform(geo.translation(offset) @ geo.about(moved, centre), points)
    inside = geo.contains(geo.transform(geo.inverse(second.affine), truth), SIZE, 2)
    places, score = EmbeddingMatcher(Planted(noise)).match(points, first, second)
    assert inside.float().mean() > 0.5
    assert distance(places, truth)[inside].median() < (2.5 if noise else 0.6)  # the lattice's step is 2.2 mm
    assert distance(places, truth)[inside].quantile(0.9) < (5 if noise else 1)
    assert (score[inside] > 0).float().mean() > 0.9


def test_what_the_other_visit_does_not_show_scores_nothing(batch):
    first, second = full_view(batch, 0), full_view(batch, 1)
    second.image = second.image + 300  # anatomy of elsewhere
    points = inner(first)
    _, score = EmbeddingMatcher(Planted(), round_trip=3.0).match(points, first, second)
    _, forward = EmbeddingMatcher(Planted(), round_trip=None).match(points, first, second)
    assert (score > 0).float().mean() < 0.15  # by chance a place's best match leads back
    assert (forward > 0).all()


def test_a_way_back_to_elsewhere_scores_nothing(batch):
    """The second visit shows one half of the anatomy twice and not the other, whose points can but lead elsewhere."""
    first, second = full_view(batch, 0), full_view(batch, 0)
    second.image = first.image.clone()
    second.image[:, :, 14:] = first.image[:, :, :14]
    points = inner(first, 100)
    hidden = geo.transform(geo.inverse(first.affine), points)[..., 0] > 17
    _, score = EmbeddingMatcher(Planted(), round_trip=2.0).match(points, first, second)
    assert (score[hidden] == 0).all()
    assert (score[~hidden] > 0).float().mean() > 0.6


def test_only_foreground_and_data_are_found(batch):
    first, second = full_view(batch, 0), full_view(batch, 0)
    second.source_foreground = torch.zeros_like(first.source_foreground)
    second.source_foreground[:, :, :10] = True
    points = inner(first, 100)
    places, _ = EmbeddingMatcher(Planted(), rounds=0).match(points, first, second)
    assert second.contains(places, foreground=True).all()
    places, _ = EmbeddingMatcher(Planted(), rounds=0, foreground=False).match(points, first, second)
    assert not second.contains(places, foreground=True).all()
    second.source_extent = torch.tensor([[20, 24, 20]] * 2)
    places, _ = EmbeddingMatcher(Planted(), rounds=0, foreground=False).match(points, first, second)
    assert (geo.transform(geo.inverse(second.affine), places)[..., 0] <= 19 + 1e-6).all()


def test_sides_that_no_stride_divides_are_padded_behind(make_batch):
    view = full_view(make_batch(1, (27, 23, 21), image="frame"), 0)
    points = inner(view)
    places, _ = EmbeddingMatcher(Planted(), rounds=3).match(points, view, view)
    assert distance(places, points).median() < 0.5


def test_samples_of_a_batch_do_not_mix(batch):
    matcher = EmbeddingMatcher(Planted())
    points = inner(full_view(batch, 0))
    together = matcher.match(points, full_view(batch, 0), full_view(batch, 1))
    for row in range(2):
        alone = batch.rows(slice(row, row + 1))
        one = matcher.match(points[row : row + 1], full_view(alone, 0), full_view(alone, 1))
        torch.testing.assert_close(one[0][0], together[0][row])
        torch.testing.assert_close(one[1][0], together[1][row])


def test_products_of_descriptors_are_the_mean_of_cosines(batch):
    maps = Planted().anatomical_maps(full_view(batch, 0).image)
    both = descriptors(maps)
    (fine, _), (coarse, _) = maps
    # lattice of stride 2 in that of stride 4: index 2 i + ½ = 4 j + 1½, so j = i / 2 - ¼
    for i in ((3, 4, 5), (6, 3, 2)):
        corner = [math.floor(n / 2 - 0.25) for n in i]
        part = [n / 2 - 0.25 - c for n, c in zip(i, corner, strict=True)]
        value = torch.zeros(2, 128, dtype=torch.float64)
        for d in range(2):
            for h in range(2):
                for w in range(2):
                    share = math.prod(p if on else 1 - p for p, on in zip(part, (d, h, w), strict=True))
                    value += share * coarse[:, :, corner[0] + d, corner[1] + h, corner[2] + w].double()
        value /= value.norm(dim=1, keepdim=True)
        expected = torch.cat([fine[:, :, i[0], i[1], i[2]].double(), value], 1) / math.sqrt(2)
        torch.testing.assert_close(both[:, :, i[0], i[1], i[2]].double(), expected, rtol=1e-4, atol=1e-5)


def test_places_are_the_same_to_the_bit_under_autocast(batch):
    points = inner(full_view(batch, 0))
    matcher = EmbeddingMatcher(Planted())
    plain = matcher.match(points, full_view(batch, 0), full_view(batch, 1))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = matcher.match(points, full_view(batch, 0), full_view(batch, 1))
    assert all(torch.equal(one, other) for one, other in zip(plain, mixed, strict=True))


def test_the_mode_of_the_network_is_left_alone(batch):
    network = Planted().train()
    EmbeddingMatcher(network).match(inner(full_view(batch, 0)), full_view(batch, 0), full_view(batch, 1))
    assert network.training


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="no anatomical_maps"):
        EmbeddingMatcher(nn.Linear(2, 2))
    with pytest.raises(InputError, match="no checkpoint"):
        EmbeddingMatcher(str(tmp_path / "none.ckpt"))
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="not written by lssl fit"):
        EmbeddingMatcher(str(tmp_path / "other.ckpt"))
    torch.save({"lssl": Planted()}, tmp_path / "unsafe.ckpt")
    with pytest.raises(InputError, match="not safe"):
        EmbeddingMatcher(str(tmp_path / "unsafe.ckpt"))
    with pytest.raises(InputError, match="round_trip"):
        EmbeddingMatcher(Planted(), round_trip=0)
    with pytest.raises(InputError, match="rounds"):
        EmbeddingMatcher(Planted(), rounds=-1)
    with pytest.raises(InputError, match="min_score"):
        select_match(torch.rand(2, 3).numpy(), 0.5, 0.0)
    with pytest.raises(InputError, match="min_score"):
        select_match(torch.rand(2, 3).numpy(), 0.5, 0.6)


# --- ladder -----------------------------------------------------------------------------------------------------------


def test_ladder_against_a_loop(generator):
    score = torch.rand(200, 6, generator=generator) ** 2
    score[:20] = 0
    index, same, rates = select_match(score.numpy(), 0.6, 0.25)
    counts = {"accepted": 0, "best": 0, "same_visit": 0}
    taken = []
    for row, scores in enumerate(score.tolist()):
        first = next((n for n, value in enumerate(scores) if value >= 0.6), None)
        if first is not None:
            rung, wanted = "accepted", first
        elif max(scores) >= 0.25:
            rung, wanted = "best", scores.index(max(scores))
        else:
            rung, wanted = "same_visit", 0
        counts[rung] += 1
        assert int(index[row]) == wanted
        assert bool(same[row]) == (rung == "same_visit")
        if rung != "same_visit":
            taken.append(scores[wanted])
    assert all(counts.values())
    for name, number in counts.items():
        assert rates[name].item() == pytest.approx(number / 200)
    assert rates["score"].item() == pytest.approx(sum(taken) / len(taken), rel=1e-5)


def test_ladder_with_nothing_found_is_finite():
    _, same, rates = select_match(torch.zeros(3, 4).numpy(), 0.5, 0.2)
    assert same.all()
    assert rates["same_visit"] == 1
    assert rates["score"] == 0
