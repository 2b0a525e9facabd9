"""Targets from tables, samples whose target is known, and folds by subject."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from lssl.data.batch import Visit
from lssl.data.datamodule import PairDataModule
from lssl.data.folds import Folds, deal
from lssl.data.samples import choose_samples
from lssl.data.targets import encode, read_targets
from lssl.utils.errors import InputError

NAN = float("nan")
TABLE = pd.DataFrame(
    {
        "subject": ["sub-01", "sub-01", "sub-02", "sub-02", "sub-10"],
        "session": ["ses-M00", "ses-M12", "ses-M00", "ses-M12", "ses-M00"],
        "time": [0.0, 1.0, 0.0, 1.0, 0.0],
        "age": [60.0, 61.0, 70.5, 71.5, NAN],
    }
)


def read(folder, **sources):
    return read_targets(TABLE, sources, str(folder))


def test_texts_become_places_in_the_alphabet_and_numbers_stay_numbers():
    words = encode("group", "visits", pd.Series(["MCI", "CN", np.nan, "MCI", "AD"], dtype=object))
    assert (words.levels, words.numeric) == (("AD", "CN", "MCI"), False)
    np.testing.assert_array_equal(words.values, np.float32([2, 1, NAN, 2, 0]))
    numbers = encode("score", "visits", pd.Series(["2", "0,1", np.nan, "2.0", "-3"], dtype=object))
    assert (numbers.levels, numbers.numeric) == (("-3", "0.1", "2"), True)
    np.testing.assert_array_equal(numbers.values, np.float32([2, 0.1, NAN, 2, -3]))
    assert [numbers.value_of(level) for level in numbers.levels] == np.float32([-3, 0.1, 2]).tolist()
    assert numbers.texts().tolist()[:2] == ["2", "0.1"]
    assert np.isnan(words.value_of("FTD"))
    mixed = encode("score", "visits", pd.Series(["2", "89+", ">3"], dtype=object))
    assert not mixed.numeric  # a bound is no number to learn from


def test_participants_sessions_visits_and_paths(tmp_path):
    (tmp_path / "participants.tsv").write_text(
        "participant_id\tDiagnosis\tsex\nsub-1\tAD\tF\nsub-02\tCN\tM\nsub-10\tn/a\tM\n"
    )
    (tmp_path / "sub-01").mkdir()
    (tmp_path / "sub-01" / "sub-01_sessions.tsv").write_text("session_id\tmmse\nses-M00\t28\nses-M12\t24\n")
    (tmp_path / "other.csv").write_text('subject,session,score\n02,M12,"5"\n02,M00,4\n10,M00,7\n')
    found = read(tmp_path, diagnosis="participants", mmse="sessions", age="visits", score=str(tmp_path / "other.csv"))
    np.testing.assert_array_equal(found["diagnosis"].values, np.float32([0, 0, 1, 1, NAN]))
    np.testing.assert_array_equal(found["mmse"].values, np.float32([28, 24, NAN, NAN, NAN]))
    np.testing.assert_array_equal(found["age"].values, np.float32([60, 61, 70.5, 71.5, NAN]))
    np.testing.assert_array_equal(found["score"].values, np.float32([NAN, NAN, 4, 5, 7]))


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        ({"diagnosis": "participants"}, "there is no .*participants.tsv; give the path of the table"),
        ({"diagnosis": "sessions"}, "no sessions.tsv"),
        ({"diagnosis": "visits"}, "has no column 'diagnosis'; it has subject, session"),
        ({"diagnosis": "patients"}, "give participants, sessions, visits, or the path"),
        ({"diagnosis": "TWICE"}, "has AD and CN as diagnosis of sub-01 ses-M00"),
        ({"mmse": "TWICE"}, "'mmse' is known for no visit in .*; the table's columns with values are diagnosis"),
    ],
)
def test_a_wrong_source_is_one_sentence(sources, says, tmp_path):
    (tmp_path / "twice.tsv").write_text("participant_id\tdiagnosis\nsub-01\tAD\nsub-01\tCN\n")
    sources = {name: source.replace("TWICE", str(tmp_path / "twice.tsv")) for name, source in sources.items()}
    with pytest.raises(InputError, match=says):
        read(tmp_path, **sources)


# --- samples ----------------------------------------------------------------------------------------------------------

PAIRS = np.array([[0, 1], [2, 3], [4, 4]])
SUBJECT = np.array([0, 0, 1, 1, 2])


def samples(kind, values, **columns):
    table = TABLE.assign(**{"split": ["train"] * 4 + ["test"], "ordered_by": "time", **columns})
    return choose_samples(table, SUBJECT, PAIRS, kind, np.float32(values), "score")


def test_each_kind_takes_its_samples_and_counts_what_it_leaves_out():
    one = samples("one", [1, NAN, 2, 3, 4])
    assert one.known["train"].tolist() == [[0, 0], [2, 2], [3, 3]]
    assert one.known["test"].tolist() == [[4, 4]]
    assert len(one.every) == 5
    assert one.notes == ["1 visit without score left out (0 subjects altogether)"]
    first = samples("first", [1, 1, NAN, 3, 4])
    assert first.known["train"].tolist() == [[0, 0]]
    assert first.notes == ["1 visit without score left out (1 subject altogether)"]
    unordered = samples("first", [1, 1, 1, 1, 1], ordered_by=["", "", "time", "time", ""])
    assert unordered.every.tolist() == [[2, 2], [4, 4]]  # the only visit of a subject is its first
    assert unordered.notes == ["1 subject left out, whose first visit is not known"]


def test_a_pair_needs_an_interval_and_has_the_target_of_its_later_visit():
    pair = samples("pair", [NAN, 1, 1, NAN, 1])
    assert pair.known["train"].tolist() == [[0, 1]]
    assert pair.every.tolist() == [[0, 1], [2, 3]]
    assert pair.notes == ["1 subject without a pair left out", "1 pair without score left out (1 subject altogether)"]
    rescan = samples("pair", [1] * 5, time=[0.0, 0.0, 0.0, NAN, 0.0])
    assert not len(rescan.every)
    assert rescan.notes[0] == "2 pairs without a known interval above 0 left out"


# --- folds ------------------------------------------------------------------------------------------------------------


def test_every_subject_is_tested_once_and_every_stratum_is_spread():
    names = [f"sub-{number:03d}" for number in range(103)]
    strata = ["a" if number % 3 else "b" for number in range(103)]
    fold = deal(names, strata, 5, seed=0)
    for stratum in "ab":
        counts = Counter(fold[[own == stratum for own in strata]].tolist())
        assert max(counts.values()) - min(counts.values()) <= 1
    counts = Counter(fold.tolist())
    assert max(counts.values()) - min(counts.values()) <= 1
    shuffled = np.random.default_rng(0).permutation(103)
    again = deal([names[place] for place in shuffled], [strata[place] for place in shuffled], 5, seed=0)
    assert (again == fold[shuffled]).all()
    assert (deal(names, strata, 5, seed=1) != fold).any()


class Cohort(PairDataModule):
    """Forty subjects of two visits at two sites."""

    def visit_table(self):
        rows = [
            (
                f"s{number:02d}",
                f"v{visit}",
                60.0 + visit,
                float(visit),
                "AB"[number % 4 == 0],
                ["x", "y", None][number % 3],
            )
            for number in range(40)
            for visit in range(2)
        ]
        return pd.DataFrame(rows, columns=["subject", "session", "age", "time", "site", "group"])

    def read(self, row):
        size = (8, 8, 8)
        return Visit(torch.full((1, *size), float(row)), torch.eye(4).double(), torch.ones(size, dtype=torch.bool))


def test_folds_split_the_cohort_by_subject_with_sites_alike():
    tested = []
    for fold in range(4):
        data = Cohort(folds=Folds(4, fold), targets={"group": "visits"})
        data.setup()
        split = data.table.drop_duplicates("subject").set_index("subject")
        sites = split.groupby(["split", "site"], observed=True).size()
        assert sites["test"].tolist() in ([2, 8], [3, 7], [8, 2], [7, 3])
        assert (split["split"].value_counts() == pd.Series({"train": 20, "val": 10, "test": 10})).all()
        tested += split.index[split["split"] == "test"].tolist()
    assert sorted(tested) == sorted(split.index)
    balanced = Cohort(folds=Folds(4, 0, ["group"]), targets={"group": "visits"})
    balanced.setup()
    groups = balanced.table[balanced.table["split"] == "test"].drop_duplicates("subject")["group"]
    assert groups.value_counts(dropna=False).between(3, 4).all()


def test_few_folds_train_in_turn_and_all_others_are_tested():
    trained, held_out = [], []
    for fold in range(4):
        data = Cohort(folds=Folds(4, fold, train=1))
        data.setup()
        split = data.table.drop_duplicates("subject").set_index("subject")["split"]
        assert (split.value_counts() == pd.Series({"test": 20, "train": 10, "val": 10})).all()
        trained += split.index[split == "train"].tolist()
        held_out += split.index[split == "val"].tolist()
    assert sorted(trained) == sorted(held_out) == sorted(split.index)


@pytest.mark.parametrize(
    ("folds", "says"),
    [
        ((2, 0), "3 or more"),
        ((5, 5), "from 0 to number"),
        ((5, 0, ["family"]), "no column 'family'"),
        ((5, 0, None, 4), "1 to 3 can train"),
    ],
)
def test_folds_that_cannot_be_are_refused(folds, says):
    with pytest.raises(InputError, match=says):
        Cohort(folds=Folds(*folds)).setup()


def test_a_batch_carries_the_targets_of_its_visits():
    data = Cohort(batch_size=4, targets={"age": "visits", "group": "visits"}, split=(1.0, 0.0, 0.0))
    data.setup()
    batch = next(iter(data.train_dataloader()))
    for name, column in (("age", 0), ("group", 1)):
        wanted = data.targets[name].values[batch.session.numpy()]
        np.testing.assert_array_equal(batch.targets[..., column].numpy(), wanted)
    swapped = batch.visits(torch.tensor([[1, 0]]).repeat(4, 1))
    assert torch.equal(swapped.targets[:, 0].nan_to_num(9), batch.targets[:, 1].nan_to_num(9))
    assert batch.rows(slice(1, 3)).targets.shape == (2, 2, 2)
    chosen = data.use_targets("group", "first")
    unknown = data.targets["group"].values[chosen.known["train"][:, 1]]
    assert not np.isnan(unknown).any()
    assert len(chosen.known["train"]) == 27
    rows = torch.cat([batch.session for batch in data.predict_dataloader()])
    assert sorted(rows[:, 0].tolist()) == list(range(0, 80, 2))


def test_without_targets_a_batch_has_none():
    data = Cohort(batch_size=2)
    data.setup()
    assert next(iter(data.train_dataloader())).targets is None
    with pytest.raises(InputError, match="'group' is to be predicted, but is not among them"):
        data.use_targets("group", "one")
