"""Classifier and Regressor: terms by hand, what is trained, whole runs, refusals, and a planted rate that is found."""

from __future__ import annotations

import math
import re
from functools import partial

import numpy as np
import pandas as pd
import planted_rates as planted
import pytest
import torch
from helpers import ROOT, TINY_NET, few, fit, sentence, tiny

import lssl
from lssl.cli.main import main
from lssl.data.batch import collate
from lssl.data.samples import Samples
from lssl.data.targets import encode
from lssl.prediction.classifier import Classifier
from lssl.prediction.readout import Readout, pair_inputs
from lssl.prediction.regressor import Regressor
from lssl.runs.outputs import read_scores
from lssl.utils.errors import InputError

NAN = float("nan")


def make(kind=Classifier, **options):
    adam = partial(torch.optim.AdamW, lr=3e-2)
    defaults = {"target": "group", "views": planted.views(), "optimizer": adam, "frozen": True}
    return kind(planted.backbone(), **{**defaults, **options})


def figures(path) -> dict:
    return pd.read_csv(path, sep="\t").set_index("metric").to_dict("index")


# --- parts ------------------------------------------------------------------------------------------------------------


def test_inputs_of_a_pair_are_state_rate_and_interval():
    first, second = torch.tensor([[1.0, 2.0]] * 2), torch.tensor([[3.0, 1.0]] * 2)
    found = pair_inputs(first, second, torch.tensor([4.0, 0.1]))
    assert found[0].tolist() == [1.0, 2.0, 0.5, -0.25, 4.0]
    torch.testing.assert_close(found[1], torch.tensor([1.0, 2.0, 4.0, -2.0, 0.1]))  # not 20: a rescan is no rate


def test_the_readout_standardises_what_it_measured_and_starts_without_a_preference():
    readout = Readout(3, 2)
    rows = torch.tensor([[1e4, 1e-4, 5.0], [1e4 + 8, 3e-4, 5.0]])
    assert not readout(rows).any()
    readout.measure([rows[:1], rows[1:]])
    torch.nn.init.eye_(readout.layers[-1].weight)
    torch.testing.assert_close(readout(rows), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    seen = readout((torch.tensor([[0.0, 0.0, 9.0]])) + readout.mean * torch.tensor([1.0, 1.0, 0.0]))
    assert seen.abs().max() < 1e-3  # the third column was constant, and does not explode


def learned(values, kind=Classifier, **options):
    """A task that has looked at training subjects of these values."""
    table = pd.Series(values, dtype=object)
    target = encode("group", "visits", table)
    rows = np.flatnonzero(~np.isnan(target.values))
    task = make(kind, **options)
    said = task.learn(target, Samples({"train": np.stack([rows, rows], 1)}, rows, []), np.arange(len(values)))
    task.connect(target)
    return task, said


def test_classes_weigh_alike_and_probabilities_are_of_the_population():
    task, said = learned(["CN"] * 6 + ["AD"] * 2 + [np.nan])
    assert said == "2 classes (training subjects: AD 2, CN 6)"
    torch.testing.assert_close(task.class_weight, torch.tensor([8 / 4, 8 / 12]))
    truth = task.truth(torch.tensor([0.0, 1.0, NAN, 7.0]))
    assert truth.tolist()[:2] == [0.0, 1.0]
    assert truth.isnan().tolist() == [False, False, True, True]
    output = torch.tensor([[0.3, -0.2], [1.0, 2.0]])
    by_hand = [2.0 * math.log(1 + math.exp(-0.5)), 8 / 12 * math.log(1 + math.exp(-1.0))]
    torch.testing.assert_close(task.loss(output, torch.tensor([0.0, 1.0])), torch.tensor(by_hand))
    # A network that knows nothing says the same for all classes, which means their shares.
    torch.testing.assert_close(task.probabilities(torch.zeros(1, 2)), torch.tensor([[0.25, 0.75]]).double())
    plain, _ = learned(["CN"] * 6 + ["AD"] * 2, balance=0.0)
    assert plain.class_weight.tolist() == [1.0, 1.0]


def test_numbers_are_standardised_by_subjects():
    task, _ = learned([10.0, 20.0, 60.0], Regressor)
    assert (task.centre.item(), task.median.item()) == (30.0, 20.0)
    error = task.loss(torch.tensor([[1.0]]), torch.tensor([20.0]))
    assert error.item() == pytest.approx(1 + 10 / np.std([10, 20, 60], ddof=1), rel=1e-5)
    squared, _ = learned([10.0, 20.0, 60.0], Regressor, error="squared")
    assert squared.loss(torch.tensor([[1.0]]), torch.tensor([20.0])).item() == pytest.approx(
        error.item() ** 2, rel=1e-5
    )
    predictions = pd.DataFrame({"output": [[1.0]], "truth": [NAN]})
    assert task.numbers(predictions)[0] == pytest.approx(30 + np.std([10, 20, 60], ddof=1))


@pytest.mark.parametrize(
    ("values", "kind", "options", "says"),
    [
        (["a"] * 4, Classifier, {}, "group is a for every training subject"),
        (["a", "a", "b"], Classifier, {}, "class b has 1 training subject; give at least 2"),
        (["a", "a", "b"], Classifier, {"classes": ["a", "c"]}, "class c has 0 training subjects"),
        ([*range(30)] * 2, Classifier, {}, "group has 30 different values .* predict numbers with Regressor"),
        (["3", "4", "x"], Regressor, {}, "group holds 'x', which is no number"),
        ([2.0, 2.0], Regressor, {}, "group is 2 for every training subject"),
    ],
)
def test_targets_that_cannot_be_learned_are_one_sentence(values, kind, options, says):
    with pytest.raises(InputError, match=says):
        learned(values, kind, **options)


@pytest.mark.parametrize("kind", ["one", "pair"])
def test_unknown_targets_are_left_out_of_the_loss(kind, tmp_path):
    data = planted.Cohort(subjects=24, unknown=6)
    data.setup("fit")
    task = make(visits=kind)
    task.eval()
    target = data.targets["group"]
    task.learn(target, data.use_targets("group", kind), data._subject)
    task.connect(target)
    torch.nn.init.normal_(task.readout.layers[-1].weight)
    row = {
        name: torch.tensor(data.table.index[data.table["subject"] == name].tolist())
        for name in ("s000", "s010", "s011")
    }
    pairs = [tuple(data._dataset(np.array([rows.tolist()]), None)[0]) for rows in row.values()]
    batch = collate(pairs)
    whole = task.losses(batch)["cross_entropy"]
    assert task.logged["unknown"].item() == pytest.approx(1 / 3)
    known = task.losses(batch.rows(slice(1, 3)))["cross_entropy"]
    torch.testing.assert_close(whole, known)
    assert whole > 0
    batch.targets.fill_(NAN)
    nothing = task.losses(batch)["cross_entropy"]
    assert nothing.item() == 0
    nothing.backward()


def test_frozen_trains_the_readout_alone_and_keeps_norms(tmp_path):
    data = planted.Cohort(subjects=24)
    task = make(visits="pair")
    before = {name: value.clone() for name, value in task.backbone.state_dict().items()}
    planted.train(task, data, tmp_path, steps=3)
    assert all(torch.equal(value, before[name]) for name, value in task.backbone.state_dict().items())
    assert task.readout.layers[-1].weight.any()
    tuned = make(visits="pair", frozen=False, lr_multipliers={"0": 0})
    planted.train(tuned, planted.Cohort(subjects=24), tmp_path, steps=3)
    after = tuned.backbone.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {"network.3.weight", "network.4.running_mean"} <= moved
    assert not [name for name in moved if name.startswith("network.0.")]


# --- a planted truth --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("visits", ["first", "pair"])
def test_a_rate_is_seen_in_pairs_and_not_in_a_first_visit(visits, tmp_path):
    data = planted.Cohort(subjects=120)
    task = make(visits=visits)
    trainer = planted.train(task, data, tmp_path)
    trainer.test(task, datamodule=data, verbose=False)
    auc = figures(next(tmp_path.glob("test/*/scores.tsv")))["auc"]
    assert auc["subjects"] == 48
    if visits == "pair":
        assert auc["low"] > 0.8, auc
    else:
        assert auc["low"] < 0.5 < auc["high"], auc


def test_an_age_is_found_and_errors_are_in_years(tmp_path):
    """The pattern's height follows nothing but the group here, so age is not in the image, and MAE is a constant's."""
    data = planted.Cohort(subjects=60, targets={"age": "visits"})
    task = make(Regressor, target="age", visits="one")
    trainer = planted.train(task, data, tmp_path, steps=40)
    trainer.test(task, datamodule=data, verbose=False)
    found = figures(next(tmp_path.glob("test/*/scores.tsv")))
    assert 3 < found["mae_constant"]["value"] < 10
    assert found["mae"]["value"] > 0.7 * found["mae_constant"]["value"]
    assert found["mae"]["low"] < found["mae"]["value"] < found["mae"]["high"]


# --- the command line -------------------------------------------------------------------------------------------------

PHANTOM = {
    "subjects": 9,
    "visits": 2,
    "size": 32,
    "spacing": 6.0,
    "num_workers": 0,
    "batch_size": 2,
    "split": [0.6, 0.2, 0.2],
    "targets": {"group": "visits", "age": "visits"},
    "rate_groups": {"slow": {"ventricles": 0.0}, "fast": {"ventricles": 0.1}},
}
DATA = {"class_path": "PhantomDataModule", "init_args": PHANTOM}
SMALL = ["--data.init_args.source_size=null"]


def test_a_classifier_from_fit_to_predict(tmp_path, capsys):
    options = [*SMALL, "--model.init_args.target=group", "--model.init_args.visits=pair"]
    run = fit(tmp_path, "classifier.yaml", options=options, data=DATA, backbone=TINY_NET)
    assert "lssl test --config" in capsys.readouterr().out
    later = ["--config", str(run / "config.yaml"), "--ckpt_path", "last"]
    main(["test", *later])
    out = capsys.readouterr().out
    assert "balanced accuracy" in out
    assert "Test metric" not in out
    table = pd.read_csv(run / "test/phantom/predictions.tsv", sep="\t")
    assert list(table) == ["subject", "session", "prediction", "probability_fast", "probability_slow", "target"]
    assert set(table["session"]) == {"visit-00/visit-01"}
    assert np.allclose(table[["probability_fast", "probability_slow"]].sum(axis=1), 1, atol=1e-5)
    scores = read_scores(run).set_index(["subject", "metric"])["value"].sort_index()
    figures = pd.read_csv(run / "test/phantom/scores.tsv", sep="\t").set_index("metric")["value"]
    for _, row in table.iterrows():  # one pair a subject
        wrong = row["probability_slow" if row["target"] == "fast" else "probability_fast"]
        assert scores[row["subject"], "brier"] == pytest.approx(wrong**2, abs=1e-4)
    assert scores["", "brier"] == pytest.approx(scores.drop("").xs("brier", level="metric").mean())
    assert scores["", "balanced_accuracy"] == pytest.approx(figures["balanced_accuracy"], abs=1e-4)
    main(["predict", *later])
    everyone = pd.read_csv(run / "predict/phantom/predictions.tsv", sep="\t").set_index("subject")
    assert len(everyone) == 9
    for _, row in table.iterrows():
        assert everyone.loc[row["subject"], "probability_fast"] == pytest.approx(row["probability_fast"], abs=1e-4)
    task = lssl.load(run)
    assert task.classes == ["fast", "slow"]
    assert task.readout.measured


def test_a_regressor_starts_from_any_checkpoint(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "before").mkdir()
    data = {"class_path": "PhantomDataModule", "init_args": {**PHANTOM, "targets": None}}
    before = fit(tmp_path / "before", "temporal_order.yaml", options=SMALL, data=data, backbone=TINY_NET)
    start = [f"--model.init_args.pretrained={before / 'checkpoints/last.ckpt'}", "--model.init_args.frozen=true"]
    options = [*SMALL, *start, "--model.init_args.target=age", "--data.init_args.folds.number=3"]
    run = fit(tmp_path, "regressor.yaml", options=options, data=DATA)
    assert "Pretrained network by TemporalOrder" in caplog.text
    main(["test", "--config", str(run / "config.yaml"), "--ckpt_path", "last"])
    table = pd.read_csv(run / "test/phantom/subjects.tsv", sep="\t")
    assert list(table) == ["subject", "samples", "prediction", "target"]
    assert (len(table), set(table["samples"])) == (3, {2})
    assert table["target"].between(50, 95).all()
    scores = read_scores(run).query("metric == 'absolute_error'").set_index("subject")["value"]
    error = (table["prediction"] - table["target"]).abs()
    assert scores[table["subject"]].to_numpy() == pytest.approx(error.to_numpy(), abs=1e-3)


@pytest.mark.parametrize(
    ("config", "options", "says"),
    few(
        [
            ("classifier.yaml", [], "target"),
            ("classifier.yaml", ["--model.init_args.target=sex"], "'sex' is to be predicted, but is not among them"),
            ("regressor.yaml", ["--model.init_args.target=group"], "group holds 'fast', which is no number"),
            (
                "classifier.yaml",
                ["--model.init_args.target=age"],
                "age has \\d+ different values|class \\S+ has 1 training",
            ),
            ("classifier.yaml", ["--model.init_args.target=group", "--model.init_args.classes=[slow]"], "at least two"),
            ("classifier.yaml", ["--model.init_args.target=group", "--model.init_args.tap=top"], "no tap 'top'"),
            (
                "classifier.yaml",
                ["--model.init_args.target=group", "--model.init_args.pretrained=no.ckpt"],
                "no checkpoint",
            ),
            (
                "classifier.yaml",
                ["--data.init_args.targets={sex: visits}", "--model.init_args.target=sex"],
                "no column 'sex'",
            ),
        ],
        4,
    ),
)
def test_mistakes_are_one_sentence(config, options, says, tmp_path, capsys):
    args = ["--config", str(ROOT / "configs" / config), *tiny(tmp_path, data=DATA, backbone=TINY_NET)]
    assert re.search(says, sentence(capsys, "fit", *args, *SMALL, *options))


def test_a_segmenters_checkpoint_is_no_classifier(tmp_path):
    with pytest.raises(InputError, match="not a checkpoint of a Classifier"):
        make().on_load_checkpoint({})
