"""The tables: values known in advance, rates chosen on validation alone, bold only where the interval says so."""

import base64
import dataclasses
import io
import re

import numpy as np
import pandas as pd
import pytest
from plans import finish, write_plan

from lssl.benchmark.figure import draw_results
from lssl.benchmark.fingerprints import cell_fingerprints
from lssl.benchmark.flatness import fall
from lssl.benchmark.plan import read_plan
from lssl.benchmark.report import write_results
from lssl.benchmark.results import _compared, by_subject, choose, collect, differences, entries
from lssl.benchmark.statistics import METHOD
from lssl.benchmark.tables import _best, ceiling_warnings, sheets
from lssl.utils.errors import InputError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        plan = read_plan(write_plan(tmp_path_factory.mktemp("benchmark"), seeds=[0, 1]))
        fingerprints = cell_fingerprints(plan)
        finish(plan, fingerprints, patch)
        return plan, fingerprints


def test_the_csv_is_tidy(finished):
    plan, fingerprints = finished
    table = collect(plan, fingerprints)
    assert not table.duplicated([c for c in table if c != "value"]).any()
    dice = table[(table["metric"] == "dice") & table["chosen"]]
    assert len(dice) == (2 * 3 + 1 + 0) * 2 * 4 * 2 + 0  # rows and the ceiling, seeds, subjects, structures
    one = dice.query(
        "strategy == 'good' and seed == 1 and budget == 'long' and subject == '002' and structure == 'csf'"
    )
    assert one["value"].item() == pytest.approx(0.3 + 0.2 + 0.1 + 0.02 + 0.01 * ((7 + 6) % 5) + 0.1)
    ranks = table[table["metric"].isin(["rank/a", "untrained/rank/a"])]
    assert set(ranks["stage"]) == {"pretrain"}
    assert set(table[table["metric"] == "pairs_per_second"]["value"]) == {200.0}


def test_the_rate_is_chosen_by_validation_where_the_test_would_choose_another(finished):
    plan, fingerprints = finished
    chosen = choose(collect(plan, fingerprints))
    assert {rate for (name, *_), rate in chosen.items() if name != "bad"} == {0.001}
    assert {rate for (name, *_), rate in chosen.items() if name == "bad"} == {0.01}
    rows = [("a", "1", "s", 0.1, seed, value) for seed, value in enumerate([0.5, 0.5])] + [("a", "1", "s", 0.2, 0, 0.9)]
    table = pd.DataFrame(rows, columns=["strategy", "labelled", "budget", "learning_rate", "seed", "value"]).assign(
        task=""
    )
    assert choose(table.assign(metric="val_dice", stage="finetune")) == {("a", "1", "s", ""): 0.1}  # 0.2 lacks a seed


def test_differences_are_paired_and_exact(finished):
    plan, fingerprints = finished
    listed = entries(collect(plan, fingerprints), list(plan.parts))
    assert [(e.labelled, e.budget) for e in listed[::3]] == [("1", "short"), ("1", "long"), ("all", "long")]
    found = {(e.strategy, e.labelled, e.budget): e for e in listed}
    good, bad, scratch = (found[name, "1", "long"] for name in ("good", "bad", "scratch"))
    assert (good.difference.mean, good.difference.low, good.difference.high) == pytest.approx((0.1, 0.1, 0.1))
    assert bad.difference.mean == pytest.approx(-0.1 + 0.05)  # it took the other rate
    assert scratch.difference is None
    assert good.scores.shape == (2, 4)
    assert ("scratch", "all", "long") in found
    assert good.equal is None  # no scratch is longer
    assert (good.compute, good.pretraining_compute) == (9e9, 5e9)  # steps × operations
    assert good.structures["csf"] - good.structures["cortex"] == pytest.approx(0.2)


def test_equal_compute_takes_the_scratch_row_that_validation_prefers_within_the_operations(finished):
    plan, fingerprints = finished
    found = {(e.strategy, e.labelled, e.budget): e for e in entries(collect(plan, fingerprints), list(plan.parts))}
    short, long = (found["scratch", "1", budget] for budget in ("short", "long"))
    short = dataclasses.replace(short, compute=1.0, means={"val_dice": 0.4})
    long = dataclasses.replace(long, compute=3.0, means={"val_dice": 0.6}, scores=long.scores + 0.3)
    good = dataclasses.replace(found["good", "1", "short"], compute=1.0, pretraining_compute=1.5, hours=99.0)
    assert _compared(good, [short, long]).equal is None  # 2.5 are fewer than 3, and hours are of no account
    assert _compared(dataclasses.replace(good, pretraining_compute=2.5), [short]).equal is None  # no longer scratch
    assert _compared(dataclasses.replace(good, pretraining_compute=2.5), [short, long]).equal[0] == "long"
    worse = dataclasses.replace(long, means={"val_dice": 0.3})
    assert _compared(dataclasses.replace(good, pretraining_compute=2.5), [short, worse]).equal[0] == "short"
    paid = _compared(dataclasses.replace(good, pretraining_compute=2.5), [short, long])
    assert paid.difference.mean == pytest.approx(0.1)  # of its own budget
    assert paid.equal[1].mean == pytest.approx(0.1 - 0.3)


def test_the_csv_holds_the_differences_with_their_method(finished):
    plan, fingerprints = finished
    found = entries(collect(plan, fingerprints), list(plan.parts))
    rows = differences(found)
    assert len(rows) == sum(entry.difference is not None for entry in found) == 4
    row = rows.query("strategy == 'good' and budget == 'long'").iloc[0]
    assert row["value"] == pytest.approx(0.1)
    assert (row["ci_method"], row["seeds"], row["clusters"]) == (METHOD, 2, 4)
    assert row["p_holm"] >= row["p"]


def test_subjects_of_one_cluster_are_one(finished):
    plan, fingerprints = finished
    table = collect(plan, fingerprints)
    table.loc[table["subject"].isin(["000", "001"]), "cluster"] = "one map"
    entry = next(e for e in entries(table, list(plan.parts)) if e.difference is not None)
    assert (entry.difference.subjects, entry.difference.clusters) == (4, 3)
    assert "4 test subjects in 3 clusters" in sheets(plan, table, entries(table, list(plan.parts)))[0].notes[0]


def test_bold_is_corrected_over_the_rows(finished):
    plan, fingerprints = finished
    found = entries(collect(plan, fingerprints), list(plan.parts))
    row = next(e for e in found if e.strategy == "good")
    p = row.difference.p
    assert row.p == pytest.approx(min(1.0, 4 * p), rel=1e-6) or row.p >= p
    sure = dataclasses.replace(row, p=0.04)
    unsure = dataclasses.replace(row, p=0.06, difference=dataclasses.replace(row.difference, low=0.01, p=0.02))
    assert _best([sure]) == {id(sure)}
    assert _best([unsure]) == set()  # its own interval lies above 0


def test_a_longer_budget_of_scratch_alone_says_whether_scratch_is_flat(finished, tmp_path):
    plan, fingerprints = finished
    table = collect(plan, fingerprints)
    table = table[(table["budget"] != "long") | (table["strategy"] == "scratch")]
    found = entries(table, list(plan.parts))
    scores = sheets(plan, table, found)[0]
    assert [tuple(row[:3]) for row in scores.rows if row[1] == "long"] == [
        ("1", "long", "scratch"),
        ("all (ceiling)", "long", "scratch"),
    ]
    told = [note for note in scores.notes if note.startswith("Flat: ")]
    assert len(told) == 1
    assert told[0].startswith("Flat: scratch, 1 labelled, short: long is better by ")
    draw_results(found, list(plan.parts), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").is_file()


def test_the_legend_names_rows_of_any_budget(finished, tmp_path, monkeypatch):
    plan, fingerprints = finished
    table, drawn = collect(plan, fingerprints), []
    table = table[(table["budget"] == "long") | (table["strategy"] == "scratch")]  # the first panel has scratch alone
    monkeypatch.setattr("lssl.benchmark.figure._save", lambda figure, path: drawn.append(figure))
    draw_results(entries(table, list(plan.parts)), list(plan.parts), tmp_path / "figure.png")
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == list(plan.parts)


def test_a_ceiling_below_a_row_is_a_warning_and_rows_that_rise_are_marked(finished, capsys):
    plan, fingerprints = finished
    table = collect(plan, fingerprints)
    assert ceiling_warnings(entries(table, list(plan.parts))) == []
    longer = (table["budget"] == "long") & (table["metric"] == "dice") & (table["strategy"] == "good")
    table.loc[longer, "value"] += 0.2
    found = entries(table, list(plan.parts))
    assert "(highest: good, 1, long" in ceiling_warnings(found)[0]
    scores = sheets(plan, table, found)[0]
    assert {tuple(row[1:3]) for row in scores.rows if "not flat" in row[1]} == {("short (not flat)", "good")}
    assert any("Not flat: good, 1 labelled, short: long is better by +0.2" in note for note in scores.notes)
    assert not any("One budget" in note for note in scores.notes)
    alone = sheets(plan, table[table["budget"] == "short"], [entry for entry in found if entry.budget == "short"])[0]
    assert any("One budget" in note for note in alone.notes)
    low = collect(plan, fingerprints)
    low.loc[(low["labelled"] == "all") & (low["metric"] == "dice"), "value"] -= 0.4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lssl.benchmark.report.collect", lambda *args: low)
        write_results(plan, fingerprints, page=False)
    assert "Warning: The ceiling" in capsys.readouterr().err
    write_results(plan, fingerprints, page=False)
    assert "Warning" not in capsys.readouterr().err


def test_a_loss_that_still_falls_at_the_end():
    steps, noise = list(range(0, 300, 10)), np.random.default_rng(0).normal(size=30)
    assert fall(steps, list(2.0 - 0.005 * np.array(steps) + 0.01 * noise)) == pytest.approx(
        0.005 * 90 / (2.0 - 0.005 * 245), rel=0.05
    )
    assert fall(steps, list(1.0 + 0.1 * noise)) == 0.0
    assert fall(steps, list(1.0 + 0.001 * np.array(steps))) == 0.0  # it rises
    assert fall(steps[:9], [1.0] * 9) is None


def test_structures_weigh_alike_and_visits_within_them():
    rows = [(0, "s", "a", "v0", 0.0), (0, "s", "a", "v1", 1.0), (0, "s", "b", "v0", 1.0)]
    table = pd.DataFrame(rows, columns=["seed", "subject", "structure", "session", "value"]).assign(metric="dice")
    assert by_subject(table, "dice").loc[0, "s"] == pytest.approx((0.5 + 1.0) / 2)


def test_tables_say_best_in_bold_only_where_the_interval_does(finished):
    plan, fingerprints = finished
    table = collect(plan, fingerprints)
    scores, structures, costs, probe, rank, retrieval = sheets(plan, table, entries(table, list(plan.parts)))
    bold = {tuple(row[:3]) for row in scores.rows if any("**" in text for text in row)}
    assert bold == {("1", "short", "good"), ("1", "long", "good")}
    assert any("ceiling" in row[0] and row[2] == "scratch" for row in scores.rows)
    shown = dict(zip(scores.head, next(r for r in scores.rows if r[:3] == ["1", "long", "bad"]), strict=True))
    assert shown["transferred"] == "encoder"
    assert shown["rate"] == "0.01"
    assert len(structures.rows) == len(scores.rows)
    by_name = {row[0]: dict(zip(costs.head, row, strict=True)) for row in costs.rows}
    assert set(by_name) == {"good", "bad"}
    assert by_name["good"]["parameters"] == "1,234"
    assert probe.head == ["strategy", "a"]
    assert dict(probe.rows) == {"scratch": "–", "good": "0.40", "bad": "0.40"}
    assert dict(rank.rows) == {"scratch": "2.50", "good": "7.50", "bad": "7.50"}  # scratch: untrained
    assert dict(retrieval.rows)["good"] == "0.80"
    uncertain = table.copy()
    mine = (uncertain["strategy"] == "good") & (uncertain["metric"] == "dice")
    uncertain.loc[mine, "value"] += np.where(uncertain[mine]["subject"] == "000", -0.3, 0.1)
    scores = sheets(plan, uncertain, entries(uncertain, list(plan.parts)))[0]
    assert not any("**" in text for row in scores.rows for text in row)  # still best, but by chance as well


def test_the_page_needs_no_other_file(finished):
    plan, fingerprints = finished
    written = write_results(plan, fingerprints, page=True)
    assert {path.name for path in written} == {"results.csv", "table.md", "figure.png", "report.html"}
    page = (plan.out / "report.html").read_text()
    assert not re.search(r"(src|href)=['\"](?!data:)", page)
    images = re.findall(r"base64,([^']+)'", page)
    assert len(images) == 2  # results and curves; the program makes no pictures
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert "<b>0." in page
    markdown = (plan.out / "table.md").read_text()
    assert "Demonstration" in markdown
    assert "seeds 0, 1" in markdown
    assert len(pd.read_csv(io.StringIO((plan.out / "results.csv").read_text()))) == len(collect(plan, fingerprints)) + 4


def test_nothing_finished_and_a_run_without_validation(finished, tmp_path):
    plan, fingerprints = finished
    with pytest.raises(InputError, match="nothing to compare"):
        collect(plan, dict.fromkeys(fingerprints, "another"))
    cell = next(cell for cell in plan.cells if cell.stage == "finetune")
    log = cell.run / "metrics.csv"
    text = log.read_text()
    log.write_text("step,train/loss\n0,1.0\n")
    try:
        with pytest.raises(InputError, match="no val/dice"):
            collect(plan, fingerprints)
    finally:
        log.write_text(text)
