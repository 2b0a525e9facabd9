"""What the monitor measures, on networks whose features are known; and two processes measure as one."""

from __future__ import annotations

import copy
import dataclasses
import math
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, multiprocessing, nn

from lssl import Backbone, Strategy, ViewSampler
from lssl.data.batch import PairBatch
from lssl.evaluation.representation import held_out_pairs, measure, trained_taps
from lssl.metrics import AgeR2, Alignment, CrossVisitRetrieval, EffectiveRank, PositionR2
from lssl.networks.heads import mean_and_max
from lssl.strategies.global_contrastive import BYOL, GlobalContrastive
from lssl.views import geometry as geo


class Still(Strategy):
    """Learns nothing; its network is what counts."""

    def terms(self, first, second, batch):
        return {"nothing": self.backbone(first.image, list(self.backbone.taps))[next(iter(self.backbone.taps))].mean()}


def still(*layers: nn.Module, channels: int = 1, size: int = 16, **views) -> Still:
    torch.manual_seed(0)
    network = nn.Sequential(*layers)
    taps = {f"tap.{number}": str(number) for number in range(len(layers))}
    return Still(Backbone(network, taps, in_channels=channels), ViewSampler(size, **views))


def coordinates() -> Still:
    """Features are the image, whose channels are its place in mm, at strides 1 and 2 (the mean of two voxels)."""
    same = nn.Conv3d(3, 3, 1, bias=False)
    same.weight.data = torch.eye(3).view(3, 3, 1, 1, 1)
    halved = nn.Conv3d(3, 3, 2, stride=2, bias=False)
    halved.weight.data = torch.eye(3).view(3, 3, 1, 1, 1).expand(3, 3, 2, 2, 2) / 8
    return still(same, halved, channels=3, transforms=[], same_visit=1.0)


def network(seed: int = 0) -> Still:
    torch.manual_seed(seed)
    return still(nn.Conv3d(1, 5, 3, padding=1), nn.ReLU(), nn.Conv3d(5, 6, 3, stride=2, padding=1))


@pytest.fixture
def batch(make_batch) -> PairBatch:
    """Five subjects, seven pairs: the first subject has three visits in three pairs, the last one visit twice."""
    seven = make_batch(7, labels=True)
    seven.affines[:] = seven.affines[:1, :1]
    images = torch.rand(10, 1, 28, 24, 20, generator=torch.Generator().manual_seed(5))
    session = torch.tensor([[0, 1], [0, 2], [1, 2], [3, 4], [5, 6], [7, 8], [9, 9]])
    ages = torch.tensor([40.0, 42, 45, 50, 51, 60, 66, 70, 71.5, 30])
    subject = torch.tensor([0, 0, 0, 1, 2, 3, 4])
    times = torch.tensor([0.0, 2, 5, 0, 1, 0, 6, 0, 1.5, 0])
    batch = dataclasses.replace(seven, images=images[session], session=session, subject=subject)
    return dataclasses.replace(batch, ages=ages[session], times=times[session])


def test_every_visit_once_and_views_for_each_subject_once(batch):
    held_out = list(held_out_pairs(network(), [batch.rows(slice(0, 4)), batch.rows(slice(4, 7))]))
    assert [case.sessions.tolist() for case in held_out] == [[0, 1], [2], [3, 4], [5, 6], [7, 8], [9]]
    assert [case.number for case in held_out] == [0, 0, 1, 2, 3, 4]
    assert [len(case.images) for case in held_out] == [5, 1, 5, 5, 5, 4]
    assert [bool(case.points_mm) for case in held_out] == [True, False, True, True, True, True]
    assert [case.two_visits for case in held_out] == [True, True, True, True, True, False]
    assert [case.ages.tolist() for case in held_out][:2] == [[40, 42], [45]]
    few = list(held_out_pairs(network(), [batch], subjects=3, visits=2))
    assert [case.sessions.tolist() for case in few] == [[0, 1], [3, 4], [5, 6]]


def test_of_series_every_visit_is_shown_once(make_batch):
    made = make_batch(2, visits=4)
    held_out = list(held_out_pairs(network(), [made]))
    assert [case.sessions.tolist() for case in held_out] == [[0, 1], [2], [3], [4, 5], [6], [7]]
    assert [case.times.tolist() for case in held_out][:3] == [[0, 2], [4], [6]]
    few = list(held_out_pairs(network(), [made], subjects=1, visits=3))
    assert [case.sessions.tolist() for case in few] == [[0, 1], [2]]


def test_the_same_views_and_points_whatever_else_is_drawn(batch):
    strategy = network()
    one = list(held_out_pairs(strategy, [batch]))
    strategy.generator.manual_seed(77)
    torch.randn(100)
    for a, b in zip(one, held_out_pairs(strategy, [batch]), strict=True):
        assert torch.equal(a.images, b.images)
        assert all(torch.equal(a.points_mm[tap], b.points_mm[tap]) for tap in a.points_mm)
    assert not torch.equal(one[0].images[2], one[2].images[2])


def test_noise_has_the_views_mean_and_deviation(batch):
    first, _, noise = next(held_out_pairs(network(), [batch])).images[2:]
    assert noise.mean().item() == pytest.approx(first.mean().item(), abs=0.02)
    assert noise.std().item() == pytest.approx(first.std().item(), rel=0.05)
    assert abs(torch.corrcoef(torch.stack([first.flatten(), noise.flatten()]))[0, 1]) < 0.1


def test_views_show_two_visits_and_are_compared_at_corresponding_places(make_batch):
    """Features that are places agree exactly at corresponding points: at every stride, through every flip and zoom."""
    batch = make_batch(4, image="frame")
    figures = measure(coordinates(), held_out_pairs(coordinates(), [batch]))
    for tap in ("tap.0", "tap.1"):
        assert figures[f"alignment/{tap}"] < 1e-6
        assert figures[f"matching/{tap}"] > 0.99
        assert figures[f"consistency/{tap}"] == pytest.approx(1, abs=1e-4)
        assert abs(figures[f"shuffled/{tap}"]) < 0.1


def test_views_show_one_visit_each_even_where_training_shows_one_twice(make_batch):
    batch = make_batch(3, affine="unit")
    batch.images[:, 0], batch.images[:, 1] = 0.2, 0.8
    strategy = still(nn.Conv3d(1, 2, 1), transforms=[], same_visit=1.0)
    for case in held_out_pairs(strategy, [batch]):
        first, second = case.images[2], case.images[3]
        assert first[first > 0].median().item() == pytest.approx(0.2, abs=0.01)
        assert second[second > 0].median().item() == pytest.approx(0.8, abs=0.01)


def test_labels_are_read_at_their_own_places(make_batch):
    """Where the image is its label, voxels tell it perfectly; at half the resolution, not quite."""
    batch = make_batch(4, labels=True)
    coarse = torch.randint(0, 4, (4, 1, 1, 7, 6, 5), generator=torch.Generator().manual_seed(0)).expand(
        4, 2, -1, -1, -1, -1
    )
    fine = coarse.repeat_interleave(4, 3).repeat_interleave(4, 4).repeat_interleave(4, 5)
    batch = dataclasses.replace(
        batch, images=F.one_hot(fine[:, :, 0]).movedim(-1, 2).float(), labels=fine[:, :, 0].short()
    )
    same, halved = nn.Conv3d(4, 4, 1, bias=False), nn.AvgPool3d(4)
    same.weight.data = torch.eye(4).view(4, 4, 1, 1, 1)
    strategy = still(same, halved, channels=4)
    figures = measure(strategy, held_out_pairs(strategy, [batch]))
    assert figures["dice/tap.0"] == pytest.approx(1)
    assert 0.3 < figures["dice/tap.1"] < 0.95


def test_small_structures_are_drawn_more_often_than_their_volume(make_batch):
    """64 voxels among 4096: 8 of 512 by volume, 57 by its root, somewhat fewer as none is drawn twice."""
    batch = make_batch(2, affine="unit", labels=True)
    batch.labels[:] = 1
    batch.labels[..., 12:16, 10:14, 8:12] = 7
    case = next(held_out_pairs(network(), [batch]))
    places, labels = case.labelled
    assert len(labels) == len(places.unique(dim=0)) == 512
    assert 25 < (labels == 7).sum() < 60
    inside = ((places >= torch.tensor([12, 10, 8])) & (places < torch.tensor([16, 14, 12]))).all(1)
    assert torch.equal(inside, labels == 7)


def test_figures_of_a_tap_by_hand(batch):
    strategy = network().eval()
    held_out = list(held_out_pairs(strategy, [batch]))
    figures = measure(strategy, held_out)
    rank, retrieval, age = EffectiveRank(6), CrossVisitRetrieval(), AgeR2()
    alignment, shortcut, tap = Alignment(), PositionR2(6), strategy.backbone.taps["tap.2"]
    with torch.no_grad():
        for case in held_out:
            features = strategy.backbone(case.images, ["tap.2"])["tap.2"]
            pooled = mean_and_max(features[: len(case.sessions)], torch.ones(len(case.sessions), 1, 8, 8, 8))
            subject = torch.full_like(case.sessions, case.subject)
            retrieval.update(pooled, subject, case.sessions)
            age.update(pooled, subject, case.sessions, case.ages)
            if case.points_mm:
                first, second, noise = features[len(case.sessions) :]
                rank.update(first.flatten(1).T)  # 512 voxels: all of them are drawn
                shortcut.update(noise.flatten(1).T, geo.lattice((8, 8, 8)), case.number)
                where = geo.feature_affine(case.affines[-2:], tap.stride, tap.offset)
                places = case.points_mm["tap.2"].expand(2, -1, -1)
                alignment.update(*geo.sample(torch.stack([first, second]), where, places))
    assert figures["rank/tap.2"] == pytest.approx(rank.compute().item(), rel=1e-5)
    assert figures["alignment/tap.2"] == pytest.approx(alignment.compute().item(), rel=1e-5)
    assert figures["alignment/tap.2"] > 1e-3
    assert figures["shortcut/tap.2"] == pytest.approx(shortcut.compute().item(), abs=1e-5)
    assert figures["retrieval/tap.2"] == retrieval.compute().item()
    assert figures["age/tap.2"] == pytest.approx(age.compute().item(), abs=1e-5)


def test_a_strategy_is_left_as_it_was(batch):
    strategy = network().train()
    before = copy.deepcopy(strategy.state_dict())
    measure(strategy, held_out_pairs(strategy, [batch]))
    assert strategy.training
    assert all(torch.equal(value, before[name]) for name, value in strategy.state_dict().items())
    assert all(parameter.grad is None for parameter in strategy.parameters())


def test_a_network_that_diverged_gives_no_numbers_and_no_error(batch):
    strategy = network()
    strategy.backbone.network[0].weight.data.fill_(float("nan"))
    figures = measure(strategy, held_out_pairs(strategy, [batch]))
    assert all(math.isnan(figures[f"{kind}/tap.2"]) for kind in ("feature_std", "rank", "alignment", "position"))


def test_taps_that_nothing_trains_are_left_out():
    backbone = network().backbone
    assert trained_taps(network()) == list(backbone.taps)
    GlobalContrastive(backbone, ["tap.0"], lambda n: BYOL(n, 8, 8), views=ViewSampler(16))  # freezes the rest
    assert trained_taps(Still(backbone, ViewSampler(16))) == ["tap.0", "tap.1"]  # a ReLU has no weights of its own


# --- two processes ----------------------------------------------------------------------------------------------------


def work(own: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=own, world_size=2, timeout=timedelta(seconds=60)
    )
    strategy = network()
    held_out = list(held_out_pairs(strategy, [torch.load(f"{folder}/batch.pt", weights_only=False)]))
    shares = {
        "in turns": [case for case in held_out if case.number % 2 == own],
        "one has none": held_out if own else [],
    }
    torch.save({name: measure(strategy, share, together=True) for name, share in shares.items()}, f"{folder}/{own}.pt")
    distributed.destroy_process_group()


def test_two_processes_measure_as_one(batch, tmp_path):
    torch.save(batch, tmp_path / "batch.pt")
    multiprocessing.start_processes(work, (str(tmp_path),), nprocs=2, start_method="fork")  # as loaders do: no imports
    alone = measure(network(), held_out_pairs(network(), [batch]))
    assert sum(not math.isnan(value) for value in alone.values()) > 40
    for own in (0, 1):
        for name, found in torch.load(tmp_path / f"{own}.pt").items():
            assert found == pytest.approx(alone, rel=1e-4, abs=1e-5, nan_ok=True), name
