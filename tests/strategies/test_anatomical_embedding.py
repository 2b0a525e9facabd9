"""AnatomicalEmbedding on a tiny network, against loops over anchors and voxels in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.correspondence.matchers import EmbeddingMatcher, full_view
from lssl.data.batch import PairBatch
from lssl.networks.backbone import Backbone, Tap
from lssl.strategies.anatomical_embedding import AnatomicalEmbedding, CoarseMap, FineMap
from lssl.utils.errors import InputError
from lssl.utils.random import host_generator, seeded
from lssl.views.points import plan_points
from lssl.views.sampler import View, ViewSampler

SIZE, SOURCE = (24, 20, 16), (28, 26, 24)
TAPS = {"fine": (2, 0.0), "deep": (4, 1.0)}  # stride and offset: a padded 3×3×3 kernel, then a 2×2×2 one
ALL = {"hard": 10**6, "diverse": 10**6}
EVERY = {"fine": ALL, "coarse": ALL}


def every(cross_subject_negatives: int) -> dict:
    """All candidates are used, and some of other subjects."""
    return {"fine": ALL, "coarse": {**ALL, "cross_subject_negatives": cross_subject_negatives}}


def sampler(**settings) -> ViewSampler:
    settings = {"transforms": [], "affine_probability": 1.0, "zoom": (0.8, 1.3), "rotation": 15.0, **settings}
    return ViewSampler(SIZE, **{"flip": (0.5, 0.5, 0.5), "overlap": 0.4, **settings})


def make(views: ViewSampler | None = None, **settings) -> AnatomicalEmbedding:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(1, 6, 3, 2, 1), nn.LeakyReLU(), nn.Conv3d(6, 7, 2, 2), nn.ConvTranspose3d(7, 2, 4, 4)
    )
    small = {"hidden": 12, "embedding": 5, "norm": "layer", "temperature": 0.3}
    fine = {"tap": "fine", "anchors": 9, "exclusion": 4.0, **settings.pop("fine", {})}
    coarse = {
        "tap": "deep",
        "anchors": 7,
        "exclusion": 6.0,
        "cross_subject_negatives": 30,
        **settings.pop("coarse", {}),
    }
    backbone = Backbone(network, {"fine": "0", "deep": "2"})
    levels = FineMap(**fine), CoarseMap(**coarse)
    return AnatomicalEmbedding(backbone, *levels, views=views or sampler(), **{**small, **settings})


@pytest.fixture
def batch(make_batch) -> PairBatch:
    """Three pairs of two subjects."""
    batch = make_batch(3, SOURCE)
    batch.subject = torch.tensor([4, 9, 4])
    batch.foreground[:, :, :, :5] = False
    return batch


def draw(strategy: AnatomicalEmbedding, batch: PairBatch) -> tuple[View, View]:
    strategy.generator.manual_seed(0)
    return strategy.views(batch, strategy.generator)


def terms(strategy: AnatomicalEmbedding, batch: PairBatch, views: tuple[View, View]) -> dict[str, Tensor]:
    strategy.generator.manual_seed(1)
    return strategy.terms(*views, batch)


# --- by hand ----------------------------------------------------------------------------------------------------------


def lattice_places(view: View, name: str, row: int) -> np.ndarray:
    stride, offset = TAPS[name]
    index = np.stack(np.meshgrid(*[np.arange(n // stride) for n in SIZE], indexing="ij"), -1).reshape(-1, 3)
    voxels = np.c_[stride * index + offset, np.ones(len(index))]
    return (voxels @ view.affine[row].numpy().T)[:, :3]


def interpolated(values: np.ndarray, view: View, name: str, row: int, place: np.ndarray) -> np.ndarray:
    """``values (D, ...)`` at one place of the frame, trilinear, of unit length."""
    stride, offset = TAPS[name]
    voxel = (np.linalg.inv(view.affine[row].numpy()) @ np.r_[place, 1])[:3]
    index = np.clip((voxel - offset) / stride, 0, np.array(values.shape[1:]) - 1)
    low = np.clip(np.floor(index).astype(int), 0, np.array(values.shape[1:]) - 2)
    vector = np.zeros(len(values))
    for corner in itertools.product((0, 1), repeat=3):
        share = np.prod([p if on else 1 - p for p, on in zip(index - low, corner, strict=True)])
        vector += share * values[:, low[0] + corner[0], low[1] + corner[1], low[2] + corner[2]]
    return vector / np.linalg.norm(vector)


def anchors(strategy: AnatomicalEmbedding, one: View, other: View, tap: Tap, count: int) -> tuple[Tensor, Tensor]:
    """Places and weights of the anchors of a term, drawn again: those of all terms are drawn at once."""
    draws = seeded(int(host_generator(strategy.generator).integers(2**62)))
    taps = [strategy.backbone.taps[each] for each in strategy.taps]
    most = max(level.anchors for level in strategy.levels.values())
    points, row = plan_points(one.host, other.host, taps, most, draws, True), taps.index(tap)
    return torch.from_numpy(points.mm[row, :, :count]), torch.from_numpy(points.weight[row])


def by_hand(strategy: AnatomicalEmbedding, batch: PairBatch, views: tuple[View, View], name: str) -> float:
    """A term without mining: every voxel farther than the exclusion is a negative, all of the other subjects' too."""
    (level,) = [level for level in strategy.levels if level == name]
    tap = strategy.backbone.taps[strategy.levels[level].tap]
    images = torch.cat([view.image for view in views])
    maps = dict(zip(strategy.levels, (values for values, _ in strategy.anatomical_maps(images)), strict=True))
    sides = maps[name].detach().double().numpy().reshape(2, len(batch), -1, *maps[name].shape[2:])
    tau, radius = strategy.mined["fine"].temperature, strategy.levels[name].exclusion
    key = strategy.levels[level].tap
    total = []
    for one, other in ((0, 1), (1, 0)):
        strategy.generator.manual_seed(1 if name == "fine" else 2)
        places, weight = anchors(strategy, views[one], views[other], tap, strategy.levels[name].anchors)
        losses = []
        for row in range(len(batch)):
            rows = [sides[side][row].reshape(sides.shape[2], -1).T for side in (one, other)]
            where = [lattice_places(views[side], key, row) for side in (one, other)]
            for place in places[row].numpy():
                anchor = interpolated(sides[one][row], views[one], key, row, place)
                positive = interpolated(sides[other][row], views[other], key, row, place)
                scores = [anchor @ positive]
                for vectors, spots in zip(rows, where, strict=True):
                    far = np.linalg.norm(spots - place, axis=1) > radius
                    scores += list(vectors[far] @ anchor)
                if name == "coarse":
                    for stranger in range(len(batch)):
                        if batch.subject[stranger] != batch.subject[row]:
                            for side in (0, 1):
                                scores += list(sides[side][stranger].reshape(sides.shape[2], -1).T @ anchor)
                scores = np.exp(np.array(scores) / tau)
                losses.append(-math.log(scores[0] / scores.sum()))
        assert (weight == 1).all()
        total.append(np.mean(losses))
    return float(np.mean(total))


@pytest.mark.parametrize("name", ["fine", "coarse"])
def test_a_term_is_what_loops_give(name, batch):
    strategy = make(loss_weights={"fine": float(name == "fine"), "coarse": float(name == "coarse")}, **every(10**6))
    views = draw(strategy, batch)
    strategy.generator.manual_seed(1 if name == "fine" else 2)
    value = strategy.terms(*views, batch)
    assert list(value) == [name]
    assert value[name].item() == pytest.approx(by_hand(strategy, batch, views, name), rel=1e-4)


def test_terms_do_not_change_when_the_views_are_swapped(batch):
    strategy = make(fine={"hard": 200, "diverse": 50}, coarse={"hard": 40, "diverse": 20})
    first, second = draw(strategy, batch)
    one, other = terms(strategy, batch, (first, second)), terms(strategy, batch, (second, first))
    assert one.keys() == {"fine", "coarse"}
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_the_own_subject_is_never_a_stranger(batch):
    """With one subject throughout, voxels of the other samples must not change a sample's term."""
    strategy = make(loss_weights={"fine": 0.0}, **every(10**6))
    views = draw(strategy, batch)
    batch.subject[:] = 4
    alone = terms(strategy, batch, views)["coarse"]
    without = make(loss_weights={"fine": 0.0}, **every(0))
    without.load_state_dict(strategy.state_dict())
    torch.testing.assert_close(alone, terms(without, batch, views)["coarse"])
    batch.subject[:] = torch.tensor([1, 2, 3])
    assert terms(strategy, batch, views)["coarse"] > alone + 0.1


def test_the_neighbourhood_is_excluded_in_mm_not_in_voxels(batch):
    """A finer view (smaller voxels) with the same radius in mm loses more voxels, not as many."""
    strategy = make(loss_weights={"coarse": 0.0}, **EVERY)
    first, second = draw(strategy, batch)
    seen = []
    strategy.mined["fine"].register_forward_pre_hook(lambda _, args: seen.append((~args[3]).sum().item()))
    shrink = torch.diag(torch.tensor([0.5, 0.5, 0.5, 1.0], dtype=torch.float64))
    small = [replace(v, affine=shrink @ v.affine, source_affine=shrink @ v.source_affine) for v in (first, second)]
    terms(strategy, batch, (first, second))
    terms(strategy, batch, tuple(small))
    assert seen[1] > 3 * seen[0] > 0  # half the voxel: up to eight times as many within the radius


def test_hard_fine_negatives_are_ranked_by_both_maps(batch):
    strategy = make(fine={"hard": 5, "diverse": 5})
    views = draw(strategy, batch)
    caught = {}

    def keep(_, args):
        if not caught:  # of the direction 1 → 2
            caught.update(ranking=args[5], rows=args[:3])

    strategy.mined["fine"].register_forward_pre_hook(keep)
    terms(strategy, batch, views)
    anchor, _, rows = caught["rows"]
    fine = F.normalize(anchor, dim=-1) @ F.normalize(rows, dim=-1).mT
    rest = 2 * caught["ranking"] - fine  # a cosine too: that of the coarse map, interpolated at both places
    coarse = strategy.anatomical_maps(torch.cat([view.image for view in views]))[1][0].detach().double().numpy()
    strategy.generator.manual_seed(1)
    places, _ = anchors(strategy, *views, strategy.backbone.taps["fine"], 9)
    node = 5 * 10 * 8 + 4 * 8 + 3  # index (5, 4, 3) of the lattice of 12 × 10 × 8, in either view
    for row, side in itertools.product(range(3), range(2)):
        place = lattice_places(views[side], "fine", row)[node]
        there = interpolated(coarse[3 * side + row], views[side], "deep", row, place)
        for k in range(9):
            here = interpolated(coarse[row], views[0], "deep", row, places[row, k].numpy())
            assert rest[row, k, 960 * side + node].item() == pytest.approx(here @ there, abs=1e-4)
    assert not caught["ranking"].requires_grad


def test_gradients_are_finite_and_reach_all_that_trains(batch):
    strategy = make(fine={"hard": 200, "diverse": 50})
    sum(terms(strategy, batch, draw(strategy, batch)).values()).backward()
    for name, parameter in strategy.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    assert strategy.heads["fine"][0].weight.grad.abs().sum() > 0
    assert strategy.heads["coarse"][0].weight.grad.abs().sum() > 0


def test_a_sample_without_shared_places_counts_as_an_exact_zero(batch):
    strategy = make(**every(0))
    first, second = draw(strategy, batch)
    second.affine[1, :3, 3] += 1000
    second.source_affine = second.source_affine.clone()
    second.source_affine[1, :3, 3] += 1000
    value = sum(terms(strategy, batch, (first, second)).values())
    value.backward()
    assert torch.isfinite(value)
    second.image[1] += 1.0  # it changes nothing, as its sample is left out
    torch.testing.assert_close(sum(terms(strategy, batch, (first, second)).values()), value)


def test_the_terms_fall_on_one_batch_and_the_maps_stay_apart(batch):
    strategy = make(temperature=0.1, fine={"hard": 200, "diverse": 50}, embedding=16, hidden=32)
    noise = F.avg_pool3d(batch.images[:, :1].flatten(0, 1), 7, 1, 3)  # blobs, the same at both visits
    batch.images = ((noise - noise.mean()) / noise.std()).unsqueeze(1).expand(-1, 2, -1, -1, -1, -1)
    batch.affines[:, 1] = batch.affines[:, 0]
    views = draw(strategy, batch)
    optimizer = torch.optim.Adam([p for p in strategy.parameters() if p.requires_grad], 3e-3)
    before, metrics = terms(strategy, batch, views), dict(strategy.logged)
    for _ in range(60):
        optimizer.zero_grad()
        sum(terms(strategy, batch, views).values()).backward()
        optimizer.step()
    after = terms(strategy, batch, views)
    assert all(after[name] < 0.85 * before[name] for name in after)
    assert strategy.logged["feature_std"] > max(metrics["feature_std"], 0.8)


def test_one_seed_one_value(batch):
    strategy = make(fine={"hard": 200, "diverse": 20})
    views = draw(strategy, batch)
    one, other = terms(strategy, batch, views), terms(strategy, batch, views)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_is_what_the_matcher_takes(batch):
    strategy = make().eval()
    view = full_view(batch, 0)
    index = torch.tensor([[[4.0, 6, 8], [10, 12, 6]]], dtype=torch.float64).expand(3, -1, -1)
    points = index @ view.affine[:, :3, :3].mT + view.affine[:, None, :3, 3]
    places, score = EmbeddingMatcher(strategy, foreground=False).match(points, view, view)
    torch.testing.assert_close(places, points)
    torch.testing.assert_close(score, torch.ones_like(score), rtol=0, atol=1e-4)


def test_bad_input():
    with pytest.raises(InputError, match="left from right"):
        make(sampler(flip_together=False))
    make(sampler(flip_together=False, flip=(0.0, 0.5, 0.5)))
    with pytest.raises(InputError, match="anchors"):
        make(fine={"anchors": 0})
    with pytest.raises(InputError, match="exclusion"):
        make(coarse={"exclusion": -1.0})
    with pytest.raises(InputError, match="no tap 'nowhere'"):
        AnatomicalEmbedding(make().backbone, FineMap("nowhere"), CoarseMap("deep"), views=sampler())
    with pytest.raises(InputError, match="coarser"):
        AnatomicalEmbedding(make().backbone, FineMap("deep"), CoarseMap("fine"), views=sampler())
    with pytest.raises(InputError, match="other than 0"):
        make(loss_weights={"fine": 0.0, "coarse": 0.0})
    with pytest.raises(InputError, match="no term 'medium'"):
        make(loss_weights={"medium": 1.0})
