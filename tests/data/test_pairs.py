"""Pairs, splits and their order."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from toy_pairs import Toy, table_of, toy

from lssl.data import loading
from lssl.data.datamodule import PairSampler
from lssl.data.pairs import build_pairs, evenly, given_split, order_notes, order_visits, split_subjects
from lssl.utils.errors import InputError


def pairs_of(policy: str, shortest: float = 0.0, longest: float | None = None, **times) -> list[list[int]]:
    return build_pairs(order_visits(table_of(**times)), policy, shortest, longest).pairs.tolist()


def test_policies_choose_pairs_in_time_order():
    cohort = {"a": [0, 1, 3], "b": [0], "c": [0, 2]}
    assert pairs_of("any", **cohort) == [[0, 1], [0, 2], [1, 2], [4, 5]]
    assert pairs_of("all", **cohort) == pairs_of("any", **cohort)
    assert pairs_of("consecutive", **cohort) == [[0, 1], [1, 2], [4, 5]]
    assert pairs_of("baseline", **cohort) == [[0, 1], [0, 2], [4, 5]]


def test_intervals_are_inclusive_and_counted():
    table = order_visits(table_of(a=[0, 1, 3], b=[0], c=[0, np.nan], d=[0, 9]))
    index = build_pairs(table, "any", 2.0, 3.0)
    assert index.pairs.tolist() == [[0, 2], [1, 2]]
    assert index.singles.tolist() == [3]
    assert index.excluded == [
        "1 pair closer than min_interval (2 years)",
        "1 pair further apart than max_interval (3 years)",
        "1 pair of unknown interval, which the limits on the interval do not allow",
        "2 subjects with several visits but no pair left",
    ]
    assert index.pairs.dtype == index.singles.dtype == np.int32


def test_pairs_equal_a_plain_loop():
    rng = np.random.default_rng(3)
    table = order_visits(table_of(**{f"s{i}": np.sort(rng.random(rng.integers(1, 7)) * 5) for i in range(60)}))
    wanted = [
        [i, j]
        for i in range(len(table))
        for j in range(i + 1, len(table))
        if table["subject"][i] == table["subject"][j] and 1 <= table["time"][j] - table["time"][i] <= 3
    ]
    assert build_pairs(table, "any", 1.0, 3.0).pairs.tolist() == wanted


def test_visits_sort_by_time_else_by_the_numbers_in_their_label():
    table = table_of(b=[2, 0, 1])
    assert order_visits(table)["session"].tolist() == ["ses-2", "ses-3", "ses-1"]
    unknown = table_of(a=[np.nan] * 11).sample(frac=1, random_state=1)
    assert order_visits(unknown)["session"].tolist() == [f"ses-{number}" for number in range(1, 12)]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (table_of(), "visit table is empty"),
        (table_of(a=[0, 1]).assign(session="ses-1"), "Duplicate visit: a ses-1 stands 2 times"),
        (table_of(a=[0, 1]).assign(session=["ses-1", None]), "Row 2 of the visit table has no session"),
    ],
)
def test_bad_tables_are_refused(table, message):
    with pytest.raises(InputError, match=message):
        order_visits(table)


def test_split_depends_on_seed_and_name_only():
    names, group = [f"p{i}" for i in range(200)], np.arange(200) % 2
    split = split_subjects(names, group, (0.7, 0.2, 0.1), seed=1)
    assert np.bincount(split).tolist() == [140, 40, 20]
    assert np.bincount(split[group == 0]).tolist() == [70, 20, 10]
    back = split_subjects(names[::-1], group[::-1], (0.7, 0.2, 0.1), seed=1)
    assert (back[::-1] == split).all()
    assert (split_subjects(names, group, (0.7, 0.2, 0.1), seed=2) != split).any()


@pytest.mark.parametrize(("number", "wanted"), [(1, [1, 0, 0]), (2, [2, 0, 0]), (3, [2, 1, 0]), (13, [11, 1, 1])])
def test_small_cohorts_keep_training_and_validation(number, wanted):
    split = split_subjects([str(i) for i in range(number)], np.zeros(number, int), (0.8, 0.1, 0.1), 0)
    assert np.bincount(split, minlength=3).tolist() == wanted


def test_validation_gets_a_subject_when_every_group_is_small():
    split = split_subjects(list("abcd"), np.array([0, 0, 1, 1]), (0.8, 0.1, 0.1), 0)
    assert np.bincount(split, minlength=3).tolist() == [3, 1, 0]
    assert split_subjects(list("abcd"), np.zeros(4, int), (0, 0, 1), 0).tolist() == [2] * 4


def test_split_of_the_table_is_followed_and_checked():
    table = order_visits(table_of(a=[0, 1], b=[0])).assign(split=["val", "val", "test"])
    subject = np.array([0, 0, 1])
    assert given_split(table, subject).tolist() == [1, 2]
    with pytest.raises(InputError, match="split of b ses-1 is 'holdout'"):
        given_split(table.assign(split=["val", "val", "holdout"]), subject)
    with pytest.raises(InputError, match="Visits of a stand in different splits"):
        given_split(table.assign(split=["val", "train", "test"]), subject)


def test_summary_counts_everything():
    source = toy(max_interval=1.5)
    assert source.summary == (
        "14 subjects, 22 visits: 8 pairs from 4 subjects (train 6, val 2, test 0); 10 single visits used as "
        "same-visit pairs (train 8, val 1, test 1); excluded: 4 pairs further apart than max_interval (1.5 years)."
    )
    dropped = toy(single_visits="drop")
    assert "excluded: 10 single visits (single_visits: drop)" in dropped.summary
    assert (dropped.train_pairs[:, 0] != dropped.train_pairs[:, 1]).all()
    assert len(source.subjects) == 14
    assert source.train_pairs.dtype == np.int32


def test_one_pair_per_subject_and_epoch_or_all():
    source = toy()
    sampler = source.train_dataloader().sampler
    epochs = [order_of(sampler, epoch) for epoch in range(40)]
    subject = source._subject
    for order in epochs:
        assert sorted(subject[row] for row, _, _ in order) == sorted(set(subject[source.train_pairs[:, 0]]))
    drawn = {(row, later) for order in epochs for row, later, _ in order}
    assert drawn == set(map(tuple, source.train_pairs.tolist()))
    assert len({seed for order in epochs for _, _, seed in order}) == 40 * len(epochs[0])
    for options in ({"pairs": "all"}, {"pairs_per_subject": "all"}):
        every = list(toy(**options).train_dataloader().sampler)
        assert sorted(item[:2] for item in every) == sorted(map(tuple, source.train_pairs.tolist()))


def order_of(sampler: PairSampler, epoch: int) -> list[tuple[int, int, int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_order_is_a_function_of_seed_epoch_and_position():
    sampler = toy().train_dataloader().sampler
    first, second = order_of(sampler, 0), order_of(sampler, 1)
    assert second != first
    assert list(sampler) == second  # asking twice does not move it on
    assert order_of(sampler, 0) == first == list(toy().train_dataloader().sampler)
    assert first != list(toy(seed=1).train_dataloader().sampler)
    for start in range(len(second) + 1):
        sampler.continue_at(1, start)
        sampler.set_epoch(1)  # as Lightning does before the resumed epoch
        assert list(sampler) == second[start:]
        assert len(sampler) == len(second)
    assert order_of(sampler, 2) != second
    assert len(order_of(sampler, 2)) == len(second)


def test_a_lengthened_epoch_takes_further_passes():
    """Each pass holds every subject once, in an order of its own."""
    sampler = toy().train_dataloader().sampler
    one = list(sampler)
    long = 3 * len(one) + 2
    sampler.lengthen(long)
    order = list(sampler)
    assert len(order) == len(sampler) == long
    passes = [order[start : start + len(one)] for start in range(0, long, len(one))]
    assert passes[0] == one
    subject = toy()._subject
    for other in passes[1:3]:
        assert sorted(subject[row] for row, *_ in other) == sorted(subject[row] for row, *_ in one)
        assert other != one
    assert len({seed for *_, seed in order}) == long
    for start in (0, 1, len(one) - 1, len(one), len(one) + 3, long):
        sampler.continue_at(0, start)
        assert list(sampler) == order[start:]


def test_ranks_share_one_order_evenly(monkeypatch):
    whole = list(toy().train_dataloader().sampler)
    monkeypatch.setattr(loading.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(loading.distributed, "get_world_size", lambda: 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(loading.distributed, "get_rank", lambda rank=rank: rank)
        shares.append(list(toy().train_dataloader().sampler))
    assert {len(share) for share in shares} == {-(-len(whole) // 4)}
    together = [item[:2] for turn in zip(*shares, strict=True) for item in turn]
    assert together[: len(whole)] == [item[:2] for item in whole]
    assert together[len(whole) :] == together[: len(together) - len(whole)]


def test_no_pairs_says_why():
    source = Toy(table_of(a=[0], b=[0]), single_visits="drop")
    source.setup()
    with pytest.raises(InputError, match=r"no pairs of visits to train on.*2 single visits \(single_visits: drop\)"):
        source.train_dataloader()
    assert source.val_dataloader() == []
    with pytest.raises(InputError, match="There are no pairs of visits to test on"):
        source.test_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": (0.8, 0.1, 0.2)}, "three shares"),
        ({"source_size": (64, 0, 64)}, r"source_size is \[64, 0, 64\]"),
        ({"min_interval": 2.0, "max_interval": 1.0}, r"max_interval \(1\) is below min_interval \(2\)"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        Toy(table_of(a=[0, 1]), **options)


def test_unordered_visits_pair_without_order_only():
    rows = [("a", "x"), ("a", "y"), ("b", "post"), ("b", "pre"), ("c", "02"), ("c", "01")]
    table = pd.DataFrame(rows, columns=["subject", "session"]).assign(age=np.nan, time=np.nan)
    table = order_visits(table)
    assert table["session"].tolist() == ["x", "y", "pre", "post", "01", "02"]
    assert table["ordered_by"].tolist() == ["", "", "words", "words", "numbers", "numbers"]
    assert build_pairs(table, "any", 0.0, None).pairs.tolist() == [[0, 1], [2, 3], [4, 5]]
    for policy in ("baseline", "consecutive"):
        index = build_pairs(table, policy, 0.0, None)
        assert index.pairs.tolist() == [[2, 3], [4, 5]]
        assert index.excluded[0] == f"1 pair of unordered visits, as pairs: {policy} needs an order"
    assert [note.split(" whose")[0] for note in order_notes(table)] == ["1 subject"] * 3


def test_known_times_against_the_labels_leave_no_order():
    table = order_visits(table_of(a=[1, np.nan, 0]))
    assert (table["ordered_by"] == "").all()
    assert table["time"].tolist()[:2] == [0, 1]


def test_a_policy_that_needs_order_is_refused_where_there_is_none():
    table = table_of(a=[np.nan] * 2, b=[np.nan] * 2).assign(session=["x", "y"] * 2)
    source = Toy(table, pairs="baseline")
    with pytest.raises(InputError, match=r"pairs is baseline, which needs the order .* 2 subjects .*: x, y; give"):
        source.setup()
    source = Toy(table)
    source.setup()
    assert "2 subjects whose visits have no known order and time" in source.summary
    batch = next(iter(source.train_dataloader()))
    assert batch.times.isnan().all()


def test_validation_weighs_subjects_alike():
    subject = np.repeat([0, 1, 2], [12, 2, 3])
    every = np.array([(i, j) for i in range(17) for j in range(i + 1, 17) if subject[i] == subject[j]])
    pairs = evenly(every, subject)
    assert np.bincount(subject[pairs[:, 0]]).tolist() == [3, 3, 3]  # the median of 66, 1 and 3
    own = pairs[subject[pairs[:, 0]] == 0]
    assert len(np.unique(own, axis=0)) == 3
    assert own[-1, 0] > 2  # spread over all, not the first ones
    assert (pairs[3:6] == [12, 13]).all()  # its only pair, repeated
    assert np.array_equal(evenly(every[66:67], subject), every[66:67])
    assert len(evenly(every[:0], subject)) == 0
