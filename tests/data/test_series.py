"""Series of K visits: which there are, in which order they come, and that all show the same box."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import numpy as np
import pytest
import torch
from toy_pairs import SHAPE, Toy, table_of

from lssl.data import loading
from lssl.data.balance import balanced_weights
from lssl.data.batch import PairBatch
from lssl.data.pairs import build_pairs, evenly, order_visits
from lssl.data.read_errors import skipped_reads
from lssl.data.series import build_series
from lssl.datamodules.synthetic_brains import SyntheticBrainsDataModule
from lssl.utils import memory
from lssl.utils.errors import InputError

TIMES = {f"p{number:02d}": np.arange(2 + number % 4) * 1.0 for number in range(12)}


def toy(visits: int = 3, **options) -> Toy:
    source = Toy(table_of(**TIMES), **{"visits_per_item": visits, "split": (0.5, 0.25, 0.25), **options})
    source.setup()
    return source


def series_of(table, policy="any", limits=(0.0, None), visits=3) -> list[list[int]]:
    index = build_pairs(table, policy, *limits)
    return build_series(table, index, policy, limits, visits).pairs.tolist()


@pytest.mark.parametrize("visits", [2, 3, 4])
@pytest.mark.parametrize("policy", ["any", "all", "consecutive", "baseline"])
@pytest.mark.parametrize("limits", [(0.0, None), (0.3, 2.5)])
def test_series_equal_a_plain_loop(policy, limits, visits):
    """Different visits in time order; the limits hold between neighbours, for whatever policy."""
    rng = np.random.default_rng(4)
    table = order_visits(table_of(**{f"s{i}": rng.random(rng.integers(1, 8)) * 5 for i in range(20)}))
    subject, time = table["subject"].to_numpy(), table["time"].to_numpy()
    wanted = []
    for name in dict.fromkeys(subject):
        rows = np.flatnonzero(subject == name).tolist()
        for chosen in combinations(rows, visits):
            gaps = np.diff(time[list(chosen)])
            fits = (gaps >= limits[0]).all() and (gaps <= (limits[1] or 99)).all()
            in_a_row = chosen[-1] - chosen[0] == visits - 1
            if fits and (policy != "consecutive" or in_a_row) and (policy != "baseline" or chosen[0] == rows[0]):
                wanted.append(list(chosen))
    assert series_of(table, policy, limits, visits) == wanted
    assert len(wanted) > 3
    assert all((np.diff(time[chosen]) > 0).all() for chosen in wanted)


def test_subjects_without_a_series_are_left_out_counted_and_named_in_the_summary():
    table = table_of(a=[0, 1, 2], b=[0, 1], c=[0], d=[0, 5, 6, 7])
    source = Toy(table, visits_per_item=3, max_interval=4.0, split=(1, 0, 0))
    source.setup()
    assert source.train_pairs.tolist() == [[0, 1, 2], [7, 8, 9]]
    assert source.train_pairs.dtype == np.int32
    assert source.summary == (
        "4 subjects, 10 visits: 2 series of 3 visits from 2 subjects (train 2, val 0, test 0); excluded: 3 pairs "
        "further apart than max_interval (4 years), 1 subject with pairs but no series of 3 visits "
        "(visits_per_item), 1 single visit (visits_per_item: 3)."
    )
    none = Toy(table, visits_per_item=5, split=(1, 0, 0))
    none.setup()
    with pytest.raises(
        InputError, match=r"no series of 5 visits to train on.*3 subjects with pairs but no series of 5"
    ):
        none.train_dataloader()
    with pytest.raises(InputError, match="visits_per_item is 1; give 2 or more"):
        Toy(table, visits_per_item=1)


def test_the_split_is_that_of_pairs():
    """Else subjects that were trained on in series would be tested on in pairs."""
    assert toy(3).table["split"].tolist() == toy(2).table["split"].tolist() == toy(4).table["split"].tolist()


def test_orders_need_known_times_where_pairs_do():
    table = order_visits(table_of(a=[1, np.nan, 0], b=[0, 1, 2]))
    assert series_of(table) == [[0, 1, 2], [3, 4, 5]]
    assert series_of(table, "consecutive") == series_of(table, "baseline") == [[3, 4, 5]]


def test_more_series_than_memory_holds_are_refused_before_they_are_made(monkeypatch):
    table = order_visits(table_of(a=np.arange(40)))
    monkeypatch.setattr(memory, "available_memory", lambda: 10**6)
    with pytest.raises(
        InputError, match=r"visits_per_item is 6: a table of 91,390 series of 4 visits needs .* pairs to"
    ):
        series_of(table, visits=6)
    assert len(series_of(table, "consecutive", visits=6)) == 35


def test_validation_takes_equally_many_of_every_subject_and_not_thousands():
    table = order_visits(table_of(a=np.arange(14), b=np.arange(12), c=np.arange(4)))
    index = build_pairs(table, "any", 0.0, None)
    series = build_series(table, index, "any", (0.0, None), 4).pairs
    assert len(series) == 1001 + 495 + 1
    chosen = evenly(series, index.subject)
    assert np.bincount(index.subject[chosen[:, 0]]).tolist() == [12, 12, 12]
    assert len(np.unique(chosen[:24], axis=0)) == 24
    assert chosen[11, 0] > 3  # spread over the visits, not the first ones


def order_of(sampler, epoch: int) -> list[tuple[int, ...]]:
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("policy", ["any", "consecutive"])
def test_order_is_a_function_of_seed_epoch_and_position(policy):
    source = toy(pairs=policy)
    sampler, subject = source.train_dataloader().sampler, source._subject
    epochs = [order_of(sampler, epoch) for epoch in range(60)]
    for order in epochs:
        assert sorted(subject[rows[0]] for *rows, _ in order) == sorted({*subject[source.train_pairs[:, 0]]})
        assert all(len({*rows}) == 3 and sorted(rows) == rows for *rows, _ in order)
    assert {item[:3] for order in epochs for item in order} == set(map(tuple, source.train_pairs.tolist()))
    assert epochs[1] == order_of(toy(pairs=policy).train_dataloader().sampler, 1) != epochs[0]
    for start in range(len(epochs[1]) + 1):
        sampler.continue_at(1, start)
        sampler.set_epoch(1)
        assert list(sampler) == epochs[1][start:]
    every = list(toy(pairs=policy, pairs_per_subject="all").train_dataloader().sampler)
    assert sorted(item[:3] for item in every) == sorted(map(tuple, source.train_pairs.tolist()))


def test_ranks_share_one_order(monkeypatch):
    whole = list(toy().train_dataloader().sampler)
    monkeypatch.setattr(loading.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(loading.distributed, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(loading.distributed, "get_rank", lambda rank=rank: rank)
        shares.append([item[:3] for item in toy().train_dataloader().sampler])
    assert [item for turn in zip(*shares, strict=True) for item in turn][: len(whole)] == [item[:3] for item in whole]


def test_batches_do_not_depend_on_workers():
    plain = list(toy(source_size=8).train_dataloader())
    assert plain[0].images.shape == (2, 3, 1, 8, 8, 8)
    for one, two in zip(plain, toy(source_size=8, num_workers=2).train_dataloader(), strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.session, two.session)


def test_all_visits_show_the_same_box_and_the_affines_say_where():
    for batch in toy(4, source_size=(8, 30, 9)).train_dataloader():
        assert batch.images.shape[1:] == (4, 1, 8, 24, 9)
        assert (batch.extent == torch.tensor([8, 24, 9])).all()
        place = batch.images.float() - batch.session[:, :, None, None, None, None] / 100
        torch.testing.assert_close(place, place[:, :1].expand_as(place), atol=1e-2, rtol=0)
        corner = batch.affines[..., :3, 3] / torch.tensor([2.0, 1.0, 1.5])
        index = corner[..., 0] * 24 * 22 + corner[..., 1] * 22 + corner[..., 2]
        torch.testing.assert_close(place[:, :, 0, 0, 0, 0].double(), index, atol=1e-2, rtol=0)
        assert (batch.times.diff(dim=1) > 0).all()
        assert (batch.session.diff(dim=1) > 0).all()


class OneForeground(Toy):
    """The last visit of a subject alone has a foreground, in a corner."""

    def read(self, row: int):
        visit = super().read(row)
        mask = torch.zeros(SHAPE, dtype=torch.bool)
        mask[1, 2, 3] = bool(self._time[row] == 2)
        return dataclasses.replace(visit, foreground=mask)


@pytest.mark.parametrize("seed", [None, 3])
def test_a_box_is_placed_by_the_foreground_of_every_visit(seed):
    source = OneForeground(table_of(a=[0, 1, 2]), visits_per_item=3)
    source.setup()
    for visit in source.read_visits((0, 1, 2), (4, 4, 4), seed):
        assert (visit.affine[:3, 3] / torch.tensor([2.0, 1.0, 1.5])).tolist() == [0, 0, 1]


class Failing(Toy):
    bad: frozenset = frozenset()

    def read(self, row: int):
        if row in self.bad:
            raise InputError(f"row {row} is damaged.")
        return super().read(row)


def test_a_series_that_cannot_be_read_is_replaced_by_another_of_its_subject(tmp_path):
    source = Failing(table_of(a=np.arange(5), b=np.arange(3)), visits_per_item=3, split=(1, 0, 0), on_error="skip")
    source.setup()
    source.trainer = type("Trainer", (), {"default_root_dir": tmp_path, "world_size": 1, "fit_loop": None})()
    Failing.bad = frozenset({2, 6})
    dataset = source._train_pairs().dataset
    for seed in range(8):
        read = [visit.session for visit in dataset[0, 2, 3, seed]]
        assert sorted({*read}) == read
        assert len(read) == 3
        assert not {*read} & Failing.bad
    assert dataset[5, 6, 7, 0] is None  # no visit stands in a series twice
    assert {row[2] for row in skipped_reads(tmp_path)} > {"nothing"}


def test_balance_counts_the_years_from_first_to_last_visit():
    table = order_visits(table_of(a=[0, 1, 1.4], b=[0, 1, 5])).assign(site="")
    series, subject = np.array([[0, 1, 2], [3, 4, 5]]), np.array([0] * 3 + [1] * 3)
    even = balanced_weights(table, subject, series.repeat([3, 1], 0), "interval", True)
    np.testing.assert_allclose(even, [1 / 6] * 3 + [1 / 2])


def some_series(pairs: int = 2, visits: int = 4) -> PairBatch:
    source = Toy(
        table_of(**{f"p{n}": np.arange(visits) for n in range(pairs)}), visits_per_item=visits, split=(1, 0, 0)
    )
    source.setup()
    source.batch_size = pairs
    return next(iter(source.train_dataloader()))


def test_visits_of_a_series_are_chosen_on_device_and_host_alike():
    batch = some_series()
    index, rows = torch.tensor([[3, 1, 0], [2, 2, 1]]), torch.tensor([[0, 0, 0], [1, 0, 1]])
    for found, wanted in ((batch.visits(index), torch.arange(2)[:, None]), (batch.visits(index, rows), rows)):
        assert torch.equal(found.session, batch.session[wanted, index])
        assert torch.equal(found.images, batch.images[wanted, index])
        np.testing.assert_array_equal(found.host.affines, batch.affines[wanted, index])
        assert torch.equal(found.subject, batch.subject)
    np.testing.assert_array_equal(batch.host.visits(index.numpy(), rows.numpy()).session, batch.session[rows, index])


def test_pairs_of_a_series():
    batch = some_series()
    assert torch.equal(batch.ends().session, batch.session[:, [0, 3]])
    assert [pair.session.tolist() for pair in batch.neighbours()] == [
        batch.session[:, [visit, visit + 1]].tolist() for visit in range(3)
    ]
    pair = batch.ends()
    assert pair.ends() is pair
    assert pair.neighbours() == [pair]
    unknown = dataclasses.replace(batch, times=torch.full((2, 4), float("nan")))
    assert np.isnan(unknown.host.times_within_pair()).all()
    assert not unknown.visits(torch.zeros(2, 3, dtype=torch.long)).host.times_within_pair().any()


def test_what_takes_pairs_alone_refuses_series():
    with pytest.raises(InputError, match="visits_per_item is 3, and a stream makes two visits"):
        SyntheticBrainsDataModule(visits_per_item=3)
    source = toy()
    source.moving = True
    with pytest.raises(InputError, match=r"tissue moves between two visits, and data.init_args.visits_per_item is 3"):
        source.val_dataloader()
