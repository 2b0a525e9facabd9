"""The tables: values known in advance, rates chosen on validation alone, bold only where the interval says so."""

import base64
import io
import re

import numpy as np
import pandas as pd
import pytest
from plans import fake, write_plan

from lssl.benchmark.fingerprints import cell_fingerprints
from lssl.benchmark.plan import read_plan
from lssl.benchmark.report import write_results
from lssl.benchmark.results import by_subject, choose, collect, entries
from lssl.benchmark.run import run_cells
from lssl.benchmark.tables import sheets
from lssl.utils.errors import InputError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("benchmark")
        program = fake(folder, patch)
        plan = read_plan(write_plan(folder, seeds=[0, 1]))
        fingerprints = cell_fingerprints(plan)
        outcome = run_cells(plan, fingerprints, 2, program=program)
        assert not outcome.failed
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
    table = pd.DataFrame(rows, columns=["strategy", "labelled", "budget", "learning_rate", "seed", "value"])
    assert choose(table.assign(metric="val_dice", stage="finetune")) == {("a", "1", "s"): 0.1}  # 0.2 lacks a seed


def test_differences_are_paired_and_exact(finished):
    plan, fingerprints = finished
    listed = entries(collect(plan, fingerprints), list(plan.parts))
    assert [(e.labelled, e.budget) for e in listed[::3]] == [("1", "short"), ("1", "long"), ("all", "long")]
    found = {(e.strategy, e.labelled, e.budget): e for e in listed}
    good, bad, scratch = (found[name, "1", "long"] for name in ("good", "bad", "scratch"))
    assert (good.difference.mean, good.difference.low, good.difference.high) == pytest.approx((0.1, 0.1, 0.1))
    assert bad.difference.mean == pytest.approx(-0.1 + 0.05)  # it took the other rate
    assert scratch.difference is None
    assert good.dice.shape == (2, 4)
    assert ("scratch", "all", "long") in found
    assert good.equal is not None
    assert good.structures["csf"] - good.structures["cortex"] == pytest.approx(0.2)


def test_equal_compute_takes_the_scratch_row_that_validation_prefers_within_the_hours(finished):
    import dataclasses

    from lssl.benchmark.results import _compared

    plan, fingerprints = finished
    found = {(e.strategy, e.labelled, e.budget): e for e in entries(collect(plan, fingerprints), list(plan.parts))}
    short, long = (found["scratch", "1", budget] for budget in ("short", "long"))
    short = dataclasses.replace(short, hours=1.0, means={"val_dice": 0.4})
    long = dataclasses.replace(long, hours=3.0, means={"val_dice": 0.6}, dice=long.dice + 0.3)
    good = dataclasses.replace(found["good", "1", "short"], hours=1.0, pretraining_hours=1.5)
    assert _compared(good, [short, long]).equal[0] == "short"  # 2.5 hours are fewer than 3
    assert _compared(dataclasses.replace(good, pretraining_hours=2.5), [short, long]).equal[0] == "long"
    worse = dataclasses.replace(long, means={"val_dice": 0.3})
    assert _compared(dataclasses.replace(good, pretraining_hours=2.5), [short, worse]).equal[0] == "short"
    paid = _compared(dataclasses.replace(good, pretraining_hours=2.5), [short, long])
    assert paid.difference.mean == pytest.approx(0.1)  # of its own budget
    assert paid.equal[1].mean == pytest.approx(0.1 - 0.3)


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
    assert len(pd.read_csv(io.StringIO((plan.out / "results.csv").read_text()))) == len(collect(plan, fingerprints))


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
